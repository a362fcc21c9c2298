"""Posteriors of all pictures, computed once and kept under a name made of everything they depend on."""

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from diffusion.data.dataset import to_tensor
from diffusion.data.pixels import read_pixels
from diffusion.data.source import Picture

Encode = Callable[[Tensor], tuple[Tensor, Tensor]]  # pixels (B, 3, H, W) -> mean and std (B, C, h, w)


def key(pictures: Sequence[Picture], encoder: str, transform: str) -> str:
    """A name made of the bytes of the pictures, what is done to them and what encodes them: never stale."""
    digest = hashlib.sha256(f"{encoder} {transform}".encode())
    for picture in pictures:
        digest.update(hashlib.sha256(picture.file.read_bytes()).digest())
    return digest.hexdigest()[:32]


def posteriors(
    pictures: Sequence[Picture], size: int, encode: Encode, file: Path, background: str = "white", batch_size: int = 32
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each picture's posterior, ``(N, C, h, w)`` float32 each.

    They are read from ``file`` if it exists, and computed and written there if not, whole or not at all.
    """
    if file.is_file():
        kept = load_file(file)
        return kept["mean"], kept["std"]
    means, stds = [], []
    for start in tqdm(range(0, len(pictures), batch_size), desc="encoding pictures", unit="batch", leave=False):
        some = pictures[start : start + batch_size]
        pixels = np.stack([read_pixels(picture.file, size, background) for picture in some])
        mean, std = encode(to_tensor(pixels))
        means.append(mean.float().cpu().contiguous())
        stds.append(std.float().cpu().contiguous())
    result = {"mean": torch.cat(means).contiguous(), "std": torch.cat(stds).contiguous()}
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}.part")  # of this process alone
    save_file(result, part)
    os.replace(part, file)
    return result["mean"], result["std"]
