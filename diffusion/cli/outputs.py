"""Where everything that is drawn goes, once it is known that it can be written there."""

import os
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion.settings import PICTURES, Settings

if TYPE_CHECKING:
    from diffusion.images import Output

LOSSLESS = ".png"
SHEETS = (".png", ".jpg", ".jpeg", ".webp")
KINDS = {"grid": SHEETS, "preview": SHEETS, "film": (".gif", *SHEETS)}  # flag -> what its file may end in


@dataclass(frozen=True)
class Outputs:
    """The files of a call. One that was named is written over; a folder or a template gets the next free name."""

    pictures: "Output"
    animation: Path | None  # where frames become one file
    grid: Path | None
    film: Path | None
    preview: Path | None
    metadata: bool

    @classmethod
    def check(cls, args: Namespace, wanted: Settings, compares: bool) -> "Outputs":
        """Raises ValueError for the first thing that cannot be written, or would write over another."""
        from diffusion.images import check_output, parse_output, slugify

        animated = args.output is not None and str(args.output).lower().endswith(".gif") and wanted.frames is not None
        pictures = parse_output(f"{str(args.output)[:-4]}{LOSSLESS}" if animated else args.output)
        longest = max(map(slugify, wanted.prompts), key=lambda slug: len(slug.encode()))
        assert wanted.seed is not None, "it was given"
        check_output(pictures, 1 if animated or compares else wanted.count, wanted.seed, longest)
        files = {name: path for name in KINDS if (path := getattr(args, name)) is not None}
        for name, path in files.items():
            _check_file(f"--{name}", path, KINDS[name], wanted.seed)
        animation = Path(args.output) if animated else None
        if animation is not None and animation.is_dir():
            raise ValueError(f"--output {animation} is a folder, and an animation is one file")
        read = [(name, getattr(wanted, name)) for name in PICTURES] + [("from_image", args.from_image)]
        if files or any(source is not None for _, source in read):
            written = [animation] if animation is not None else _written(pictures, wanted)
            _check_distinct(written, {f"--{name}": path for name, path in files.items()}, read)
        _check_counts(args, wanted, compares, animated)
        _check_lossless(pictures, wanted, animated)
        found = cls(pictures, animation, args.grid, args.film, args.preview, not args.no_metadata)
        for flag, path in found.named.items():
            if path.exists() and not os.access(path, os.W_OK):  # which replacing it would not ask
                raise ValueError(f"{flag} {path} is write-protected: name another file, or allow it to be written")
        return found

    @property
    def named(self) -> dict[str, Path]:
        """By its flag each file that was named, which is written over."""
        from diffusion.images import render

        letter = render(self.pictures, index=1, seed=0, slug="") if self.pictures.named else None
        files = {"output": letter if self.animation is None else self.animation}
        files |= {name: getattr(self, name) for name in KINDS}
        return {f"--{name}": path for name, path in files.items() if path is not None}

    def places(self, seed: int, slug: str) -> Iterator[str]:
        """Where the first picture would go, and all that is written beside it."""
        from diffusion.images import next_index, render

        index = next_index(self.pictures, seed=seed, slug=slug)
        yield str(self.animation or render(self.pictures, index=index, seed=seed, slug=slug))
        for name in KINDS:
            if getattr(self, name) is not None:
                yield f"its {name} to {getattr(self, name)}"


def check_together(calls: Sequence[Outputs]) -> None:
    """That no call writes over what another one has written. ValueError for a file that several of them name."""
    taken = set[Path]()
    for outputs in calls:
        for flag, path in outputs.named.items():
            if path.resolve() in taken:
                what = "give a folder" if flag == "--output" else "leave it out, or draw one picture at a time"
                raise ValueError(f"{flag} {path} is one file, and each of {len(calls)} pictures would write it: {what}")
        taken |= {path.resolve() for path in outputs.named.values()}


def _check_file(flag: str, path: Path, kinds: tuple[str, ...], seed: int) -> None:
    """That a file of one of these kinds can be written there."""
    from diffusion.images import Output, check_output

    if path.suffix.lower() not in kinds:
        raise ValueError(f"{flag} {path} must end in one of {', '.join(kinds)}")
    if "{" in str(path) or "}" in str(path):
        raise ValueError(f"{flag} {path} is one file, and no template: give a name without braces")
    if path.is_dir():
        raise ValueError(f"{flag} {path} is a folder: name a file")
    check_output(Output(str(path), named=True), 1, seed, "", flag)


def _written(pictures: "Output", wanted: Settings) -> list[Path]:
    """Where pictures would go if nobody else wrote there in the meantime."""
    from diffusion.images import next_index, render, slugify

    shots = [(shot.seed, slugify(shot.prompt)) for shot in wanted.shots()]
    first = next_index(pictures, seed=shots[0][0], slug=shots[0][1])
    return [render(pictures, index=first + n, seed=seed, slug=slug) for n, (seed, slug) in enumerate(shots)]


def _check_distinct(written: Sequence[Path], files: Mapping[str, Path], read: Sequence[tuple[str, Any]]) -> None:
    """That no file is written over by another, or is a picture that is read."""
    taken = {Path(str(source)).resolve(): name for name, source in read if source is not None}
    for path in written:
        if path.resolve() in taken:
            raise ValueError(f"--output {path} is {taken[path.resolve()]} too: give each a file of its own")
    taken |= {path.resolve(): "--output" for path in written}
    for flag, path in files.items():
        if path.resolve() in taken:
            raise ValueError(f"{flag} {path} is {taken[path.resolve()]} too: give each a file of its own")
        taken[path.resolve()] = flag


def _check_counts(args: Namespace, wanted: Settings, compares: bool, animated: bool) -> None:
    """That a film is of one picture, and a grid of several files."""
    if args.film is not None and compares:
        raise ValueError("--film shows how one picture comes about, and --compare draws several")
    if args.film is not None and wanted.count > 1:
        raise ValueError(f"--film shows how one picture comes about, and {wanted.count} were asked for")
    if args.grid is not None and (compares or animated):
        raise ValueError("--grid is of the pictures of a call, and here they go into one file: leave it out")


def _check_lossless(pictures: "Output", wanted: Settings, animated: bool) -> None:
    """That what a mask keeps, or is extended, can stay as it is to the last bit."""
    suffix = Path(pictures.template).suffix.lower()
    if (wanted.mask is not None or wanted.extend is not None) and not animated and suffix != LOSSLESS:
        raise ValueError(
            f"what is kept of a picture stays to the last bit, which {suffix} cannot store: name a {LOSSLESS}"
        )


def name_parts(wanted: Settings) -> dict[str, Any]:
    """What names a file of a whole call."""
    from diffusion.images import slugify

    return {"seed": wanted.seed, "slug": slugify(wanted.prompts[0])}
