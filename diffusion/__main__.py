"""``python -m diffusion`` is the ``diffusion`` command."""

from diffusion.cli import enter

if __name__ == "__main__":
    enter()
