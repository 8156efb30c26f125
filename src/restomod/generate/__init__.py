"""Text generation: decoding with a key/value cache, sampling, comparison of two models."""
