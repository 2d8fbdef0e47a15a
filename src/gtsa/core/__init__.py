"""Shared by all packages: types, errors, settings, files, the terminal. Imports nothing by itself."""
