"""Train a model: ``python train.py CONFIG.yaml [key=value ...]``. See ``--help``."""

import sys
from functools import partial

from diffusion.cli import enter, main

if __name__ == "__main__":
    enter(partial(main, ["train", *sys.argv[1:]]))
