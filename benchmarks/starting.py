"""P6: from a cold shell, against the stock library: a wrong flag, an import ready to load, the first picture."""

import subprocess
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.measure import Contest, contest
from benchmarks.table import Row

ROOT = Path(__file__).parents[1]
STOCK = """
import torch
from diffusers import StableDiffusionPipeline
pipeline = StableDiffusionPipeline.from_pretrained({model!r})
pipeline("panda", generator=torch.Generator().manual_seed(1), **{settings}).images[0].save({file!r})
"""
STOCK_FLAG = """
import argparse
from diffusers import StableDiffusionPipeline
argparse.ArgumentParser().parse_args(["--setps", "3"])
"""


def rows(rounds: int) -> list[Row]:
    """The three rows; every candidate is a process of its own."""
    model = str(ROOT / "assets" / "emoji")
    with TemporaryDirectory() as scratch:
        file = str(Path(scratch) / "picture.png")
        same = {"num_inference_steps": 20, "guidance_scale": 3.0}
        flag = contest(
            {
                "stock": partial(python, "-c", STOCK_FLAG),
                "ours": partial(python, str(ROOT / "generate.py"), "panda", "--setps", "3"),
            },
            rounds,
            "a wrong flag",
        )
        ready = contest(
            {
                "stock": partial(python, "-c", "from diffusers import StableDiffusionPipeline"),
                "ours": partial(python, "-c", "from diffusion import TextToImage"),
            },
            rounds,
            "ready to load",
        )
        ours = [str(ROOT / "generate.py"), "panda", "--seed", "1", "--output", file]
        picture = contest(
            {
                "stock": partial(python, "-c", STOCK.format(model=model, settings={}, file=file)),
                "stock, our steps": partial(python, "-c", STOCK.format(model=model, settings=same, file=file)),
                "ours": partial(python, *ours),
                "ours, 20 steps": partial(python, *ours, "--steps", "20", "--sampler", "ddim", "--cfg", "3"),
            },
            rounds,
            "first picture",
        )
    return [
        row("P6a", "a wrong flag, seconds", flag, "stock", "ours", 20),
        row("P6b", "import, ready to load", ready, "stock", "ours", 3),
        row("P6c", "first picture, each by its defaults", picture, "stock", "ours", 2),
        row("P6c", "first picture, same 20 steps", picture, "stock, our steps", "ours, 20 steps", 2),
    ]


def row(label: str, what: str, found: Contest, theirs: str, ours: str, wanted: float) -> Row:
    """A row of the table."""
    return Row.of(label, what, found, theirs, ours, wanted, limit="importing torch alone takes about 1 s")


def python(*words: str) -> None:
    """Run a fresh interpreter to its end; a wrong flag ends it with 2."""
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 2):
        raise RuntimeError(done.stderr[-2000:])
