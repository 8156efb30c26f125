"""The model, its weight files, parameter counts and FLOPs."""
