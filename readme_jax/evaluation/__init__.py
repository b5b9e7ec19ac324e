"""Perplexity by domain and by expert, and how experts are used."""
