"""Statistics and plots of model weights."""
