"""What runs cost, what they taught, and which is better. Reads only files; needs no torch."""
