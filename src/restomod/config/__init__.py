"""Settings of runs and data preparation: dataclasses with checks, JSON files, presets."""
