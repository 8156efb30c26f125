"""Evaluation tasks, one module per benchmark, and their registry."""
