"""From a file, wherever it lies, to its pixels."""
