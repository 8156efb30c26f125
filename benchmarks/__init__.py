"""Benchmarks of restomod and other projects, in alternating rounds on one machine."""
