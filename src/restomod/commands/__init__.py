"""Commands of the command line: one module each, with its flags and `run(arguments)`, which returns the exit code."""
