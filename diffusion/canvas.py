"""A picture to begin from: fitted to what the model can draw, and laid back under what was drawn.

The autoencoder reads sides that are multiples of its factor, so a canvas is padded by repeating its edge and cut again
at the end. Where the mask is black the finished picture has the pixels that were there, to the last bit.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter, ImageOps

from diffusion.pixels import read_rgb, to_rgb
from diffusion.settings import Settings
from diffusion.values import Source, as_image

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Canvas:
    """What is drawn on. ``pixels`` ``(H, W, 3)``; ``mask`` ``(H, W)``, 255 where it is drawn anew, None: everywhere.

    H and W are multiples of the autoencoder's factor; ``size`` is the (width, height) of the finished picture.
    """

    pixels: Pixels
    mask: Pixels | None
    size: tuple[int, int]

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

    ValueError names a picture that cannot be read, and a mask that does not fit it or opens nothing.
    """
    if wanted.init_image is None:
        return None
    assert wanted.width is not None and wanted.height is not None  # noqa: PT018 - filled() gave them
    left, top, right, bottom = around = wanted.extend or (0, 0, 0, 0)
    inner = wanted.width - left - right, wanted.height - top - bottom
    picture = read(wanted.init_image)
    mask = None if wanted.mask is None else read_mask(wanted.mask, picture.size)
    whole = _extended(np.asarray(fit(picture, inner)), around)
    if mask is None and wanted.extend is None:
        return pad_to(Image.fromarray(whole), side)
    kept = np.zeros(inner[::-1], np.uint8) if mask is None else np.asarray(fit(mask, inner, Image.Resampling.BILINEAR))
    opened = np.pad(kept, ((top, bottom), (left, right)), constant_values=255)
    if not opened.any():
        raise ValueError("there is nothing to draw: the mask is black everywhere, and white is what is drawn anew")
    assert wanted.mask_blur is not None, "filled() gave it"
    return pad_to(Image.fromarray(whole), side, soften(Image.fromarray(opened), wanted.mask_blur))


def pad_to(picture: Image.Image, side: int, mask: Image.Image | None = None) -> Canvas:
    """A canvas of a picture: its edge, and its mask's, repeated to the right and below up to multiples of ``side``."""
    beyond = (0, -picture.height % side), (0, -picture.width % side)
    pixels = np.pad(np.asarray(picture), (*beyond, (0, 0)), mode="edge")
    return Canvas(pixels, None if mask is None else np.pad(np.asarray(mask), beyond, mode="edge"), picture.size)


def cut(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The top left of what was padded; untouched where it has the size."""
    return image if image.size == size else image.crop((0, 0, *size))


def _extended(pixels: Pixels, sides: tuple[int, int, int, int]) -> Pixels:
    """What is beyond a picture begins as its edge: nothing there is known, and all of it is drawn anew."""
    left, top, right, bottom = sides
    return np.pad(pixels, ((top, bottom), (left, right), (0, 0)), mode="edge")


def read(source: Source) -> Image.Image:
    """A picture as it is meant to look, in RGB. ValueError names a file that cannot be read."""
    if isinstance(source, str | Path):
        return read_rgb(Path(source))
    try:
        return to_rgb(as_image(source))
    except OSError as error:
        raise ValueError(f"a picture cannot be read ({error})") from None


def read_mask(source: Source, size: tuple[int, int]) -> Image.Image:
    """A mask in grey for a picture of a ``size``: the largest of its channels, so that any bright colour opens.

    What is transparent is drawn anew. ValueError for a mask of another shape than the picture's.
    """
    mask = read(source)
    across, down = size
    if abs(mask.height * across - mask.width * down) > max(size):  # more than a rounded pixel
        raise ValueError(
            f"the mask is {mask.width}x{mask.height} and the picture {across}x{down}: give a mask of the same shape"
        )
    return Image.fromarray(np.asarray(mask).max(axis=2))


def soften(mask: Image.Image, blur: float) -> Image.Image:
    """The mask with edges that fade over ``blur`` pixels, and only inwards: what is black stays black.

    A fade of 0 at the border of black and 1 inside multiplies the mask, so that grey keeps its meaning. What is
    narrower than the fade reaches 1 in its own middle.
    """
    values = np.asarray(mask)
    if blur == 0 or values.all():
        return mask
    depth = (_depths(values > 0, blur + 0.5) - 0.5).clip(0)
    fade = depth / np.maximum(_nearby(depth, math.ceil(blur)), 0.5).clip(max=blur)
    return Image.fromarray((values * fade.clip(max=1)).round().astype(np.uint8))


def _depths(opened: npt.NDArray[np.bool_], most: float) -> npt.NDArray[np.float32]:
    """Of every pixel the distance to the nearest closed one, at most ``most``: squares along rows, then down."""
    squares = np.where(opened, np.float32(np.inf), np.float32(0))
    for axis in (1, 0):
        along = squares
        for n in range(1, min(math.ceil(most), opened.shape[axis]) + 1):
            for shift in (n, -n):
                squares = np.minimum(squares, _moved(along, shift, axis) + n * n)
    return np.sqrt(squares).clip(max=most)


def _moved(values: npt.NDArray[np.float32], shift: int, axis: int) -> npt.NDArray[np.float32]:
    """Values moved along an axis; what comes in from beyond the edge is infinite."""
    moved = np.roll(values, shift, axis)
    edge = slice(None, shift) if shift > 0 else slice(shift, None)
    moved[(edge, slice(None)) if axis == 0 else (slice(None), edge)] = np.inf
    return moved


def _nearby(depth: npt.NDArray[np.float32], steps: int) -> npt.NDArray[np.float32]:
    """The largest depth that so many steps lead to without leaving the opening."""
    found = depth
    for _ in range(steps):
        before, around = found, np.asarray(Image.fromarray(found).filter(ImageFilter.MaxFilter(3)))
        found = np.where(depth > 0, around, before)
        if np.array_equal(found, before):
            break
    return found


def fit(image: Image.Image, size: tuple[int, int], way: Image.Resampling = Image.Resampling.LANCZOS) -> Image.Image:
    """Scaled to cover and cut in the middle, never stretched; untouched where it has the size.

    Of a mask not by Lanczos, whose overshoot would open what is black.
    """
    return image if image.size == size else ImageOps.fit(image, size, way)
