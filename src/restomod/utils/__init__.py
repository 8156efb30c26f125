"""Helpers that know nothing of models or runs: errors, files, text, tables, pictures, the terminal."""
