"""Decode a picture as it is meant to look: sRGB, upright, on a background, cropped to a shape."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")  # an explicit list: no format that runs code or calls a program


@dataclass(frozen=True, kw_only=True)
class View:
    """How a picture is seen: scaled to cover a shape, cut there, perhaps mirrored.

    ``place`` is where the side that is too long is cut: 0 keeps the left or top, 0.5 the middle, 1 the right or bottom.
    """

    width: int
    height: int
    background: str = "white"
    place: float = 0.5
    flip: bool = False

    def corner(self, sides: tuple[int, int]) -> tuple[int, int]:
        """(left, top) of what is shown, in pixels of the scaled picture as it is shown: mirrored if it is."""
        scale = max(self.width / sides[0], self.height / sides[1])
        spare = round(sides[0] * scale) - self.width, round(sides[1] * scale) - self.height
        left, top = (round(self.place * pixels) for pixels in spare)
        return spare[0] - left if self.flip else left, top


def read_pixels(file: Path, view: View | int) -> npt.NDArray[np.uint8]:
    """A picture as ``(height, width, 3)`` uint8 sRGB; a number is the side of a square on white.

    Of an animation the first frame. ``ValueError`` names a file that cannot be read.
    """
    view = View(width=view, height=view) if isinstance(view, int) else view
    return look(read_rgb(file, view.background), view)


def read_rgb(file: Path, background: str = "white", content: bytes | None = None) -> Image.Image:
    """The whole picture; ``content`` is what the file holds, where it is no file of its own. ValueError names it."""
    with _opened(file, content) as opened:
        return to_rgb(opened, background)


def read_size(file: Path, content: bytes | None = None) -> tuple[int, int]:
    """Width and height as a viewer shows them, from the header. ``ValueError`` names an unreadable file."""
    with _opened(file, content) as opened:
        return oriented_size(opened)


def oriented_size(image: Image.Image) -> tuple[int, int]:
    """Width and height once it is turned as EXIF says."""
    turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    return image.size[::-1] if turned else image.size


def look(image: Image.Image, view: View) -> npt.NDArray[np.uint8]:
    """What a view shows of a picture, ``(height, width, 3)`` uint8."""
    if image.size != (view.width, view.height):
        centering = (view.place, view.place)
        image = ImageOps.fit(image, (view.width, view.height), Image.Resampling.LANCZOS, centering=centering)
    return np.array(ImageOps.mirror(image) if view.flip else image)


@contextmanager
def _opened(file: Path, content: bytes | None) -> Iterator[Image.Image]:
    try:
        with Image.open(file if content is None else io.BytesIO(content), formats=FORMATS) as opened:
            yield opened
    except FileNotFoundError:
        raise ValueError(f"{file} is not there") from None
    except UnidentifiedImageError:
        raise ValueError(f"{file}: cannot be read as a picture (none of {', '.join(FORMATS)})") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file}: cannot be read as a picture ({error})") from None


def to_rgb(image: Image.Image, background: str = "white") -> Image.Image:
    """Mode RGB in the sRGB colour space, turned as EXIF says, with what is transparent laid on the background.

    Pillow's ``convert("RGB")`` alone bares the colours hidden under transparency, clips 16-bit greys to white and
    ignores colour profiles.
    """
    image = ImageOps.exif_transpose(image)
    profile = image.info.get("icc_profile")
    if image.mode == "F":
        raise ValueError("32-bit float pixels have no known range; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        image = _from_16_bit(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        colours = _to_srgb(image.convert("RGB"), profile)
        colours.putalpha(image.getchannel("A"))
        return Image.alpha_composite(Image.new("RGBA", image.size, background), colours).convert("RGB")
    return _to_srgb(image.convert("RGB") if image.mode in ("1", "P") else image, profile)


def _from_16_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    grey = Image.fromarray(((values.clip(0, 65535) * 255 + 32767) // 65535).astype(np.uint8))
    if "transparency" in image.info:
        grey.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
    return grey


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """By its profile where there is one that fits the pixels; a damaged one counts as none, as in browsers."""
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            space = source.profile.xcolor_space.strip()
            if space == {"L": "GRAY"}.get(image.mode, image.mode):
                target = ImageCms.createProfile("sRGB")
                converted = ImageCms.profileToProfile(image, source, target, outputMode="RGB")
                assert converted is not None  # it is only in place that nothing comes back
                return converted
        except (ImageCms.PyCMSError, OSError):
            pass
    return image.convert("RGB")
