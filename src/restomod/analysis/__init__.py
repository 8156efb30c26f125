"""Analysis of runs: symptoms and verdict, comparison, report, weight statistics."""
