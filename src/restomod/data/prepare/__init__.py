"""Resumable preparation of text into token shards, with several workers."""
