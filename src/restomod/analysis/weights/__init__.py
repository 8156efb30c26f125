"""A model's weights in numbers and pictures."""
