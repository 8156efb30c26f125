"""Health of a run: symptoms in its metrics and weights, and the verdict."""
