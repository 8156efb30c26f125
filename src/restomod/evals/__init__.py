"""Evaluation of a model: validation loss and tasks by log-likelihood, scored, beside published results."""
