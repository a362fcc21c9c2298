"""Make pictures from text: ``python generate.py "a red apple"``. See ``--help``."""

import sys

from diffusion.cli.generate import run

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:], prog="generate.py"))
