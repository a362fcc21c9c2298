"""Make pictures from text: ``python generate.py "a red apple"``. See ``--help``."""

import sys
from functools import partial

from diffusion.cli import enter
from diffusion.cli.generate import run

if __name__ == "__main__":
    enter(partial(run, sys.argv[1:], prog="generate.py"))
