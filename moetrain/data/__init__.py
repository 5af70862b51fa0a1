"""Text to training batches: tokenizer, indexed token files, preparation of raw text, blended data sets."""
