"""Training: setup, training loop, recovery from failures, console output."""
