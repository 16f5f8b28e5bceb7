"""Runs plans: sessions, training, generation, checkpoints and exchange with Hugging Face."""
