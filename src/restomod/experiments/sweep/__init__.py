"""Sweeps: many runs with varied settings."""
