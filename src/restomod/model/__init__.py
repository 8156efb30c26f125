"""The model, its weights on disk, and its arithmetic."""
