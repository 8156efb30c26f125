"""From text to batches: sources, tokenizer, shards, preparation, batches."""
