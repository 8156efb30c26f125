"""Before a run: its plan, and sweeps of many runs."""
