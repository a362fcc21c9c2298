"""A picture to begin from: fitted to what the model can draw, and laid back under what was drawn.

The autoencoder reads sides that are multiples of its factor, so a canvas is padded by repeating its edge and cut again
at the end. Where the mask is black the finished picture has the pixels that were there, to the last bit.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter, ImageOps

from diffusion.pixels import read_rgb, to_rgb
from diffusion.settings import Settings, Source

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Canvas:
    """What is drawn on. ``pixels`` ``(H, W, 3)``; ``mask`` ``(H, W)``, 255 where it is drawn anew, None: everywhere.

    H and W are multiples of the autoencoder's factor; ``size`` is the (width, height) of the finished picture.
    """

    pixels: Pixels
    mask: Pixels | None
    size: tuple[int, int]

    @property
    def sides(self) -> tuple[int, int]:
        """Width and height of what the network draws."""
        return self.pixels.shape[1], self.pixels.shape[0]

    def cells(self, factor: int) -> npt.NDArray[np.float32] | None:
        """``(H / factor, W / factor)`` in 0 .. 1: how much of a latent cell is drawn anew, its most open pixel."""
        if self.mask is None:
            return None
        height, width = (side // factor for side in self.mask.shape)
        return self.mask.reshape(height, factor, width, factor).max(axis=(1, 3)).astype(np.float32) / 255

    def finish(self, drawn: Image.Image) -> Image.Image:
        """The picture of what was drawn: cut to size, with what the mask keeps put back."""
        new = np.asarray(drawn)[: self.size[1], : self.size[0]]
        if self.mask is None:
            return Image.fromarray(new.copy())
        kept = self.pixels[: self.size[1], : self.size[0]]
        share = self.mask[: self.size[1], : self.size[0], None].astype(np.float32) / 255
        mixed = (kept + share * (new.astype(np.float32) - kept)).round().astype(np.uint8)
        return Image.fromarray(np.where(share > 0, mixed, kept))


def make_canvas(wanted: Settings, side: int) -> Canvas | None:
    """The canvas of a filled request, or None where it begins from noise alone; ``side`` is the autoencoder's factor.

    ValueError names a picture that cannot be read.
    """
    if wanted.init_image is None:
        return None
    assert wanted.width is not None and wanted.height is not None  # noqa: PT018 - filled() gave them
    left, top, right, bottom = wanted.extend or (0, 0, 0, 0)
    inner = wanted.width - left - right, wanted.height - top - bottom
    picture = fit(read(wanted.init_image), inner)
    mask = None if wanted.mask is None else fit(read_mask(wanted.mask), inner)
    around = ((top, bottom), (left, right))
    pixels = np.pad(np.asarray(picture), (*around, (0, 0)), mode="edge")
    if mask is not None or wanted.extend is not None:
        open_cells = np.zeros((inner[1], inner[0]), np.uint8) if mask is None else np.asarray(mask)
        mask = Image.fromarray(np.pad(open_cells, around, constant_values=255))
        mask = soften(mask, wanted.mask_blur)
    beyond = (0, -wanted.height % side), (0, -wanted.width % side)
    padded = None if mask is None else np.pad(np.asarray(mask), beyond, mode="edge")
    return Canvas(np.pad(pixels, (*beyond, (0, 0)), mode="edge"), padded, (wanted.width, wanted.height))


def read(source: Source) -> Image.Image:
    """A picture as it is meant to look, in RGB. ValueError names a file that cannot be read."""
    return read_rgb(Path(source)) if isinstance(source, str | Path) else to_rgb(source)


def read_mask(source: Source) -> Image.Image:
    """A mask in grey: white is drawn anew. Of a picture with transparency, what is transparent is drawn anew."""
    if isinstance(source, str | Path):
        return read_rgb(Path(source)).convert("L")
    return to_rgb(source).convert("L")


def soften(mask: Image.Image, blur: float) -> Image.Image:
    """The mask with an edge that fades over ``blur`` pixels, and only inwards: what was black stays black."""
    if blur == 0:
        return mask
    faded = np.asarray(mask.filter(ImageFilter.GaussianBlur(blur / 2)), np.float32)
    hard = np.asarray(mask, np.float32)
    inwards = np.clip(2 * faded - 255, 0, 255)  # 0 on the edge itself, where the blurred mask is one half
    return Image.fromarray(np.where(hard > 0, np.minimum(inwards, hard).clip(1), 0).round().astype(np.uint8))


def fit(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scaled to cover and cut in the middle, never stretched; untouched where it has the size."""
    return image if image.size == size else ImageOps.fit(image, size, Image.Resampling.LANCZOS)
