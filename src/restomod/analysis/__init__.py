"""After a run: its health, comparison with others, report, weights."""
