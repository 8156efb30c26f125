"""Benchmark of a training step: the command `restomod bench`."""
