"""Preparation of any amount of text, by several workers, resumable."""
