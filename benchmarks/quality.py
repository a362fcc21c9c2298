"""P3: seconds a picture of the stock pipeline's 50 guided steps over ours, at equal or better pictures.

Quality is measured on captions that no training has seen: how often the nearest of all emoji is the one that was asked
for, and KID (Binkowski et al. 1801.01401) between what was drawn and the true pictures, on the features of the model's
own autoencoder, as no Inception weights are at hand.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from tqdm import tqdm

from benchmarks.drawing import ROOT, stock
from benchmarks.measure import contest
from benchmarks.table import Row
from diffusion import TextToImage
from diffusion.data.source import read_folder
from diffusion.evaluation import rank, thumbnail
from diffusion.models.networks import encode_pixels, to_pixels

DATA = ROOT / "data" / "emoji"
Features = npt.NDArray[np.float64]
Draw = Callable[[str, int], Image.Image]


def rows(rounds: int) -> list[Row]:
    """The shipped model by its recipe, and its few-step student."""
    if not DATA.is_dir():
        raise SystemExit("benchmarks: quality needs data/emoji: python assets/emoji/build.py")
    peer = stock(ROOT / "assets" / "emoji", torch.float32)

    def theirs(prompt: str, seed: int) -> Image.Image:
        noise = torch.Generator("cpu").manual_seed(seed)
        return peer(prompt, num_inference_steps=50, guidance_scale=3.0, generator=noise).images[0]

    draws: dict[str, Draw] = {"stock, 50 steps": theirs, "ours": partial(ours, TextToImage.load("emoji"))}
    if (ROOT / "assets" / "emoji-fast").is_dir():
        fast = TextToImage.load("emoji-fast")
        draws |= {"student": partial(ours, fast), "student, 3 steps": partial(ours, fast, steps=3)}
    told = {name: quality(draw, name) for name, draw in draws.items()}
    found = contest({name: partial(draw, "panda", 1) for name, draw in draws.items()}, rounds, "a picture")
    asked = {
        "ours": ("without a new network", 8.0),
        "student": ("a four-step student", 20.0),
        "student, 3 steps": ("the same in three steps", 20.0),
    }
    return [
        Row.of("P3", f"stock 50 steps / ours, {asked[name][0]}", found, "stock, 50 steps", name, asked[name][1],
               limit="one evaluation a picture", stock_pictures=told["stock, 50 steps"], our_pictures=told[name])
        for name in draws if name in asked
    ]  # fmt: skip


def ours(model: TextToImage, prompt: str, seed: int, **settings: int) -> Image.Image:
    """By the model's own defaults."""
    return model(prompt, seed=seed, literal=True, **settings)[0]


def quality(draw: Draw, title: str) -> dict[str, float]:
    """Top 1, top 5 and KID on all held-out captions."""
    train, held_out = (read_folder(DATA, split) for split in ("train", "held_out"))
    pictures = [*train, *held_out]
    thumbnails = np.stack([thumbnail(Image.fromarray(picture.pixels(128))) for picture in pictures])
    drawn = [draw(p.text, seed) for seed, p in enumerate(tqdm(held_out, desc=title, leave=False))]
    ranks = [rank(thumbnail(image), thumbnails, len(train) + n) for n, image in enumerate(drawn)]
    true = features([Image.fromarray(picture.pixels(128)) for picture in held_out])
    top = {f"top {k}": round(float(np.mean([one < k for one in ranks])), 3) for k in (1, 5)}
    return top | {"KID x 1000": round(1000 * kid(features(drawn), true), 2)}


@torch.inference_mode()
def features(images: list[Image.Image]) -> Features:
    """``(N, 128)``: the autoencoder's latents, averaged over 4x4 cells, of unit scale."""
    vae = TextToImage.load("emoji", "cpu", "fp32").model.vae
    latents = torch.cat([encode_pixels(vae, to_pixels([image.convert("RGB")]))[0] for image in images])
    return torch.nn.functional.avg_pool2d(latents, 4).flatten(1).double().numpy()


def kid(one: Features, other: Features) -> float:
    """The unbiased squared maximum mean discrepancy under (x . y / d + 1)^3."""

    def kernel(a: Features, b: Features) -> Features:
        return (a @ b.T / a.shape[1] + 1) ** 3

    m, n = len(one), len(other)
    own, others = kernel(one, one), kernel(other, other)
    within = (own.sum() - np.trace(own)) / (m * (m - 1)) + (others.sum() - np.trace(others)) / (n * (n - 1))
    return float(within - 2 * kernel(one, other).mean())
