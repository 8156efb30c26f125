"""Verbs of the command line: each module has its flags, and ``run``, which gives the exit code."""
