"""Refactor a dense model: `python train.py --gin_file=configs/recipes/demo.gin`, the same as `readme-jax refactor`."""

from readme_jax.cli import start

if __name__ == "__main__":
    start(["refactor"])
