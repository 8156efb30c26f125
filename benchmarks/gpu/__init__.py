"""Benchmarks on one rented GPU, prepared beforehand and measured in two short calls (`docs/benchmarks.md`)."""
