"""Helpers of all other packages: errors, files, text, tables, figures, console output, file names of a run."""
