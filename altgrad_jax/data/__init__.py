"""Text to batches: sources, tokenizers, the token cache, and grain batches."""
