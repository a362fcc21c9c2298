"""Posteriors of pictures, each computed once and kept under a name made of everything that it depends on."""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from diffusion.data.dataset import to_tensor
from diffusion.data.pixels import read_pixels

Encode = Callable[[Tensor], tuple[Tensor, Tensor]]  # pixels (B, 3, H, W) -> mean and std (B, C, h, w)


@dataclass(frozen=True, kw_only=True)
class View:
    """A picture as it is encoded."""

    file: Path
    width: int
    height: int
    background: str = "white"
    flip: bool = False


@dataclass(frozen=True)
class Cache:
    """A folder with one small file a view; processes fill it together, and stopping one loses at most a batch.

    The name hashes the picture's bytes, what is done to it and ``encoder``, a digest of the weights that encode it: an
    edited picture, another size or another encoder is never mistaken for this one.
    """

    folder: Path
    encoder: str

    def path(self, view: View) -> Path:
        digest = hashlib.sha256(view.file.read_bytes())
        digest.update(f" {self.encoder} {view.width}x{view.height} {view.background} {view.flip} fp32".encode())
        name = digest.hexdigest()[:40]
        return self.folder / name[:2] / f"{name}.safetensors"

    def fill(self, views: Sequence[View], encode: Encode, batch_size: int = 32) -> list[tuple[Tensor, Tensor]]:
        """Mean and standard deviation, ``(C, h, w)`` float32 each, of every view; what is missing is encoded."""
        paths = [self.path(view) for view in views]
        missing = [i for i, path in enumerate(paths) if not path.is_file()]
        missing.sort(key=lambda i: (views[i].width, views[i].height))
        start = os.getpid() % len(missing) if missing else 0  # processes begin apart and skip what another has done
        with tqdm(total=len(missing), desc="encoding pictures", unit="img", leave=False, disable=not missing) as bar:
            for batch in _batches(missing[start:] + missing[:start], views, batch_size):
                todo = [i for i in batch if not paths[i].is_file()]
                if todo:
                    _encode([views[i] for i in todo], [paths[i] for i in todo], encode)
                bar.update(len(batch))
        return [(kept["mean"], kept["std"]) for kept in map(load_file, paths)]

    def count(self, views: Sequence[View]) -> int:
        """How many of the views are there."""
        return sum(self.path(view).is_file() for view in views)


def _batches(indices: Sequence[int], views: Sequence[View], batch_size: int) -> list[list[int]]:
    """Runs of one shape, of at most ``batch_size``."""
    batches: list[list[int]] = []
    for i in indices:
        last = views[batches[-1][0]] if batches else None
        if (
            last is None
            or (last.width, last.height) != (views[i].width, views[i].height)
            or len(batches[-1]) == batch_size
        ):
            batches.append([])
        batches[-1].append(i)
    return batches


def _encode(views: Sequence[View], paths: Sequence[Path], encode: Encode) -> None:
    pixels = np.stack([read_pixels(v.file, (v.width, v.height), v.background, v.flip) for v in views])
    means, stds = (part.float().cpu() for part in encode(to_tensor(pixels)))
    if not torch.isfinite(means).all():
        raise FloatingPointError(f"the autoencoder's latents of {views[0].file} and others are not finite: use fp32")
    for path, mean, std in zip(paths, means, stds, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        save_file({"mean": mean.contiguous(), "std": std.contiguous()}, part)
        os.replace(part, path)
