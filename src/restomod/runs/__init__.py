"""Run folders: configuration, metrics, checkpoints, trackers."""
