"""Data pipeline: text sources, tokenizer, token shards, preparation, and training batches."""
