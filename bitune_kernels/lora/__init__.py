"""LoRA with two adapters over contiguous blocks of rows of one packed batch. Knows nothing of transformers."""
