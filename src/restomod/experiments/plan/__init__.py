"""Estimates of a run's memory, time, cost and final loss."""
