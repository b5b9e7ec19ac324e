"""Serving: requests in, tokens out, with routes known before the backbone runs (docs/serving.md)."""
