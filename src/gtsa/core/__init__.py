"""What all wings share: types, errors, settings, files, the terminal. Imports nothing by itself."""
