"""Measurements that anyone can repeat: restomod beside others, in turns, on one machine (`docs/benchmarks.md`)."""
