"""Visits to batches of tensors: pixels for an autoencoder, latents with captions for a denoiser."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from diffusion import rng
from diffusion.data.order import Visit
from diffusion.data.pixels import read_pixels
from diffusion.data.source import Picture

Batch = dict[str, Tensor]
BINS = 8  # noise levels of a probe


def to_tensor(pixels: npt.NDArray[np.uint8]) -> Tensor:
    """``(B, H, W, 3)`` uint8 to ``(B, 3, H, W)`` float32 in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1.0


@dataclass(kw_only=True)
class PixelSet:
    """Square random crops of pictures. Decoded pictures are kept in memory up to ``memory`` bytes."""

    pictures: Sequence[Picture]
    size: int
    crop: int
    seed: int
    latent_channels: int
    factor: int  # pixels per latent cell along one side
    background: str = "white"
    memory: int = 2 << 30
    _kept: dict[Path, npt.NDArray[np.uint8]] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitems__(self, visits: Sequence[Visit]) -> Batch:
        pictures = [self.pictures[index] for index, _ in visits]
        ids, numbers = [picture.id for picture in pictures], [number for _, number in visits]
        corners = rng.uniform(self.seed, "crop", ids, numbers, size=2) * (self.size - self.crop + 1)
        crops = [
            self._pixels(picture.file)[top : top + self.crop, left : left + self.crop]
            for picture, (top, left) in zip(pictures, corners.astype(int), strict=True)
        ]
        shape = (self.latent_channels, self.crop // self.factor, self.crop // self.factor)
        return {
            "pixels": to_tensor(np.stack(crops)),
            "noise": torch.from_numpy(rng.normal(self.seed, "posterior", ids, numbers, shape=shape)),
            "id": torch.tensor(ids),
            "visit": torch.tensor(numbers),
        }

    def _pixels(self, file: Path) -> npt.NDArray[np.uint8]:
        if (pixels := self._kept.get(file)) is None:
            pixels = read_pixels(file, self.size, self.background)
            if len(self._kept) * pixels.nbytes < self.memory:
                self._kept[file] = pixels
        return pixels


@dataclass(kw_only=True)
class LatentSet:
    """Cached posteriors with a caption, a noise and a time drawn anew at every visit.

    With ``in_bins`` visit k draws its time from bin k of ``BINS`` equal ones, and the latent is the posterior's mean.
    """

    pictures: Sequence[Picture]
    posteriors: Sequence[Sequence[tuple[Tensor, Tensor]]]  # of each picture the views: mean and std, (C, h, w) each
    seed: int
    offset_noise: float = 0.0
    input_perturbation: float = 0.0
    in_bins: bool = False
    caption: Callable[[Picture, int], str]
    tokenize: Callable[[list[str]], Tensor]

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitems__(self, visits: Sequence[Visit]) -> Batch:
        index = [index for index, _ in visits]
        pictures = [self.pictures[i] for i in index]
        ids, numbers = [picture.id for picture in pictures], [number for _, number in visits]
        views = self._views(index, ids, numbers)
        mean, std = (torch.stack(part) for part in zip(*views, strict=True))
        shape = mean.shape[1:]

        def normal(purpose: str, *shape: int) -> Tensor:
            return torch.from_numpy(rng.normal(self.seed, purpose, ids, numbers, shape=shape))

        noise = normal("noise", *shape)
        if self.offset_noise > 0:
            noise = noise + self.offset_noise * normal("noise.offset", shape[0], 1, 1)
        u = torch.from_numpy(rng.uniform(self.seed, "time", ids, numbers, size=1))[:, 0]
        u, spread = ((torch.tensor(numbers) + u) / BINS, 0.0) if self.in_bins else (u, 1.0)
        extra = {"perturbation": normal("noise.input", *shape)} if self.input_perturbation > 0 else {}
        return extra | {
            "latents": mean + spread * std * normal("posterior", *shape),
            "tokens": self.tokenize([self.caption(p, n) for p, n in zip(pictures, numbers, strict=True)]),
            "noise": noise,
            "u": u,
            "id": torch.tensor(ids),
            "visit": torch.tensor(numbers),
        }

    def _views(self, index: Sequence[int], ids: Sequence[int], numbers: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """One view of each picture, drawn anew at each visit where there are several; a probe takes the first."""
        if self.in_bins or all(len(self.posteriors[i]) == 1 for i in index):
            return [self.posteriors[i][0] for i in index]
        draws = rng.uniform(self.seed, "view", ids, numbers, size=1)[:, 0]
        return [self.posteriors[i][int(u * len(self.posteriors[i]))] for i, u in zip(index, draws, strict=True)]
