"""Measurements of speed, as a verb."""
