"""Tasks: a module each, and the registry of them."""
