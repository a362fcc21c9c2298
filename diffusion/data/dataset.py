"""Visits to batches of tensors: pixels for an autoencoder, latents with captions for a denoiser."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from diffusion import rng
from diffusion.data.order import Visit
from diffusion.data.source import Picture
from diffusion.pixels import View

Batch = dict[str, Tensor]
Visited = tuple[Picture, int]  # a picture and the number of this visit to it
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
        return self.collate([(self.pictures[index], number) for index, number in visits])

    def shape_of(self, index: int) -> tuple[int, int]:
        """Width and height of what a picture gives."""
        return self.crop, self.crop

    def collate(self, visited: Sequence[Visited]) -> Batch:
        """A batch of these visits."""
        pictures, numbers = [picture for picture, _ in visited], [number for _, number in visited]
        ids = [picture.id for picture in pictures]
        corners = rng.uniform(self.seed, "crop", ids, numbers, size=2) * (self.size - self.crop + 1)
        crops = [
            self._pixels(picture)[top : top + self.crop, left : left + self.crop]
            for picture, (top, left) in zip(pictures, corners.astype(int), strict=True)
        ]
        shape = (self.latent_channels, self.crop // self.factor, self.crop // self.factor)
        return {
            "pixels": to_tensor(np.stack(crops)),
            "noise": torch.from_numpy(rng.normal(self.seed, "posterior", ids, numbers, shape=shape)),
            "id": torch.tensor(ids),
            "visit": torch.tensor(numbers),
        }

    def _pixels(self, picture: Picture) -> npt.NDArray[np.uint8]:
        if (pixels := self._kept.get(picture.file)) is None:
            pixels = picture.pixels(View(width=self.size, height=self.size, background=self.background))
            if picture.content is None and len(self._kept) * pixels.nbytes < self.memory:
                self._kept[picture.file] = pixels
        return pixels


@dataclass(kw_only=True)
class LatentSet:
    """Pictures with a caption, a view, a noise and a time drawn anew at every visit.

    ``posteriors`` holds mean and std ``(C, h, w)`` of every view of every picture, picture by picture; without it a
    batch has the pixels instead, and the loss encodes them. With ``in_bins`` visit k draws its time from bin k of
    ``BINS`` equal ones, the view is the first and the latent the posterior's mean.
    """

    pictures: Sequence[Picture]
    views: Callable[[Picture], Sequence[View]]
    posteriors: Sequence[Mapping[str, Tensor]] | None
    latent_channels: int
    factor: int  # pixels per latent cell along one side
    seed: int
    offset_noise: float = 0.0
    input_perturbation: float = 0.0
    in_bins: bool = False
    sizes: bool = False  # of SDXL: a batch says how large each picture was, and where it is cut
    caption: Callable[[Picture, int], str]
    encode_text: Callable[[list[str]], Batch]  # captions to tokens, or to what an encoder has made of them

    def __len__(self) -> int:
        return len(self.pictures)

    def shape_of(self, index: int) -> tuple[int, int]:
        """Width and height of what a picture gives: only equal ones go into one batch."""
        view = self.views(self.pictures[index])[0]
        return view.width, view.height

    def __getitems__(self, visits: Sequence[Visit]) -> Batch:
        places = [index for index, _ in visits]
        return self.collate([(self.pictures[index], number) for index, number in visits], places)

    def collate(self, visited: Sequence[Visited], places: Sequence[int] = ()) -> Batch:
        """A batch of these visits; ``places`` says where in ``pictures`` they are, for the posteriors."""
        pictures, numbers = [picture for picture, _ in visited], [number for _, number in visited]
        ids = [picture.id for picture in pictures]
        draws = np.zeros(len(ids)) if self.in_bins else rng.uniform(self.seed, "view", ids, numbers, size=1)[:, 0]
        views = [self.views(picture) for picture in pictures]
        chosen = [int(draw * len(of)) for draw, of in zip(draws, views, strict=True)]
        view = views[0][0]
        shape = (self.latent_channels, view.height // self.factor, view.width // self.factor)

        def normal(purpose: str, *shape: int) -> Tensor:
            return torch.from_numpy(rng.normal(self.seed, purpose, ids, numbers, shape=shape))

        posterior = torch.zeros(len(ids), *shape) if self.in_bins else normal("posterior", *shape)
        batch = {"id": torch.tensor(ids), "visit": torch.tensor(numbers)}
        if self.posteriors is None:
            shown = [picture.pixels(of[k]) for picture, of, k in zip(pictures, views, chosen, strict=True)]
            batch |= {"pixels": to_tensor(np.stack(shown)), "posterior": posterior}
        else:
            found = [self.posteriors[i * len(of) + k] for i, of, k in zip(places, views, chosen, strict=True)]
            mean, std = (torch.stack([one[name] for one in found]) for name in ("mean", "std"))
            batch["latents"] = mean + std * posterior
        if self.sizes:
            batch["sizes"] = torch.tensor([_sizes(p, of[k]) for p, of, k in zip(pictures, views, chosen, strict=True)])
        if any(picture.loss_weight != 1 for picture in pictures):
            batch["weight"] = torch.tensor([picture.loss_weight for picture in pictures])
        batch["noise"] = normal("noise", *shape)
        if self.offset_noise > 0:
            batch["noise"] += self.offset_noise * normal("noise.offset", shape[0], 1, 1)
        if self.input_perturbation > 0:
            batch["perturbation"] = normal("noise.input", *shape)
        u = torch.from_numpy(rng.uniform(self.seed, "time", ids, numbers, size=1))[:, 0]
        batch["u"] = (batch["visit"] + u) / BINS if self.in_bins else u
        captions = [self.caption(picture, number) for picture, number in zip(pictures, numbers, strict=True)]
        return batch | self.encode_text(captions)


def _sizes(picture: Picture, view: View) -> list[float]:
    """Height and width of the original, top and left of the cut, height and width shown (SDXL 2307.01952, 2.2)."""
    (width, height), (left, top) = picture.sides, view.corner(picture.sides)
    return [float(n) for n in (height, width, top, left, view.height, view.width)]
