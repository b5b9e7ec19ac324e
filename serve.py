"""Serve a model: `python serve.py --checkpoint runs/demo/export`, the same as `readme-jax serve`."""

from readme_jax.cli import start

if __name__ == "__main__":
    start(["serve"])
