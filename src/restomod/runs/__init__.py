"""A run's folder: settings, records, checkpoints, trackers."""
