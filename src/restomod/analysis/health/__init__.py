"""Named symptoms in a run's records, and the verdict on a run."""
