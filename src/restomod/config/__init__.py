"""Dataclasses of a run's settings, their checks, JSON, and the presets."""
