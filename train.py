"""Train a model: ``python train.py CONFIG.yaml [key=value ...]``. See ``--help``."""

import sys

from diffusion.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
