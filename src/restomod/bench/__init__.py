"""Benchmark of a training step for the command `restomod bench`."""
