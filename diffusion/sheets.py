"""Pictures of pictures: grids with and without labels, and films."""

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from diffusion.images import FORMATS, atomic, encode, texts_of

PAPER, INK = "white", "black"


def make_grid(images: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """One RGB sheet of equal cells, row by row on white, as near to square as may be unless ``columns`` is given."""
    if not images:
        raise ValueError("a grid needs at least one picture")
    if columns is not None and columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    across = min(columns if columns is not None else math.ceil(math.sqrt(len(images))), len(images))
    width, height = max(image.width for image in images), max(image.height for image in images)
    sheet = Image.new("RGB", (across * width, math.ceil(len(images) / across) * height), PAPER)
    for i, image in enumerate(images):
        sheet.paste(image, (i % across * width, i // across * height))
    return sheet


def make_table(images: Sequence[Image.Image], columns: Sequence[str], rows: Sequence[str]) -> Image.Image:
    """A grid with a label above every column and before every row; ``images`` row by row. No rows: no labels there."""
    cell = max(image.width for image in images), max(image.height for image in images)
    font = ImageFont.load_default(max(11, min(cell) // 11))
    margin = max((math.ceil(font.getlength(label)) for label in rows), default=0)
    left, top = margin + (16 if rows else 0), math.ceil(font.getbbox("Ag")[3] * 1.5)
    gap = max(2, min(cell) // 64)
    size = left + len(columns) * (cell[0] + gap), top + max(1, len(rows)) * (cell[1] + gap)
    sheet = Image.new("RGB", (math.ceil(size[0]), math.ceil(size[1])), PAPER)
    pen = ImageDraw.Draw(sheet)
    for n, label in enumerate(columns):
        across = left + n * (cell[0] + gap) + cell[0] // 2
        pen.text((across, top // 2), _fitting(label, cell[0], font), INK, font, anchor="mm")
    for n, label in enumerate(rows):
        pen.text((left - 8, top + n * (cell[1] + gap) + cell[1] // 2), label, INK, font, anchor="rm")
    for n, image in enumerate(images):
        sheet.paste(image, (left + n % len(columns) * (cell[0] + gap), top + n // len(columns) * (cell[1] + gap)))
    return sheet


def save_sheet(image: Image.Image, path: str | Path) -> Path:
    """Write a picture that was named, with the texts of its ``info``; whole or not at all."""
    path = Path(path)
    with atomic(path) as stream:
        encode(image, stream, FORMATS.get(path.suffix.lower(), "PNG"), texts_of(image))
    return path


def save_film(frames: Sequence[Image.Image], path: str | Path, seconds: float = 2.0) -> Path:
    """Frames as an animation (.gif, .webp) of so many seconds, its last frame held; else as one strip of eight.

    All of them are shown in the size of the last one, whose texts the film carries.
    """
    path, size = Path(path), frames[-1].size
    frames = [frame if frame.size == size else frame.resize(size, Image.Resampling.LANCZOS) for frame in frames]
    if path.suffix.lower() not in (".gif", ".webp"):
        last = len(frames) - 1
        some = sorted({round(k * last / 7) for k in range(8)}) if last > 7 else range(len(frames))
        strip = make_grid([frames[k] for k in some], columns=len(some))
        strip.info.update(texts_of(frames[-1]))
        return save_sheet(strip, path)
    each = max(20, round(1000 * seconds / len(frames)))
    durations = [each] * (len(frames) - 1) + [each + 1000]
    animated = {"save_all": True, "append_images": frames[1:], "duration": durations, "loop": 0}
    with atomic(path) as stream:
        encode(frames[0], stream, path.suffix[1:].upper(), texts_of(frames[-1]), **animated)
    return path


def _fitting(label: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """A label cut to a width, with an ellipsis where it was."""
    if font.getlength(label) <= width:
        return label
    while label and font.getlength(f"{label}…") > width:
        label = label[:-1]
    return f"{label}…"
