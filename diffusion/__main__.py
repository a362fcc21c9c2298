"""``python -m diffusion`` is the ``diffusion`` command."""

import sys

from diffusion.cli import enter

if __name__ == "__main__":
    enter()
