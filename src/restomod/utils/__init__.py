"""Helpers for all other folders: errors, files, text, tables, figures, the terminal, the names of a run's files."""
