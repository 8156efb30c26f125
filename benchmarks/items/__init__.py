"""Benchmarks, one module each with a function `measure` from a `BenchPlan` to an `Item`."""
