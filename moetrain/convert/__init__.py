"""Between checkpoints: Hugging Face folders, dense models cut into experts."""
