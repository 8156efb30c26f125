"""Evaluation of language models: validation loss and log-likelihood tasks, compared with published results."""
