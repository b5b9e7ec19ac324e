"""Refactor a dense model: `python train.py --gin_file=configs/recipes/demo.gin`, the same as `readme-jax refactor`."""

import sys

from readme_jax.cli import main

if __name__ == "__main__":
    main(["refactor", *sys.argv[1:]])
