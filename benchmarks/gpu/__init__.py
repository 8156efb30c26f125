"""Benchmarks on one rented GPU, prepared in advance and measured in two short sessions (`docs/benchmarks.md`)."""
