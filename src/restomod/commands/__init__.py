"""Commands: one module per command, with a dataclass of flags and `run(arguments)`, which returns the exit code."""
