"""Models in and out: Hugging Face folders, GGUF files, mixtures, and the checkpoints of a run."""
