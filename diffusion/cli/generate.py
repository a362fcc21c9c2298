"""``generate.py PROMPT ... [flags]``: make pictures from text.

The paths of the pictures go to stdout, one a line, or with ``--json`` one event a line; everything else goes to stderr.
Nothing slow is imported before the request has been checked as far as it can be without a library.
"""

import hashlib
import json
import os
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion.cli.request import Request, parser, quiet_libraries, separate
from diffusion.settings import PICTURES, Settings, Shot, variants

if TYPE_CHECKING:
    from PIL import Image

    from diffusion.pipeline import Progress, TextToImage

Keep = Callable[["Image.Image", Shot], "Path | None"]


def run(argv: Sequence[str], prog: str = "diffusion generate") -> int:
    """Make the pictures that the command line asks for, and return the exit code."""
    voice = Voice(prog, json="--json" in argv, quiet="--quiet" in argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: voice.trouble("warning", f"warning: {message}")
            return generate(argv, voice)
    except KeyboardInterrupt:
        voice.trouble("error", "interrupted")
        return 130
    except BrokenPipeError:  # the reader of our stdout has left; Python would complain once more when it flushes
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # whatever it was, a person gets one line
        voice.trouble("error", reason(error))
        return 1


def generate(argv: Sequence[str], voice: "Voice") -> int:
    """Until the first step a ValueError means that the request cannot be met; from then on, that something failed."""
    try:
        reader = parser(voice.prog)
        args = reader.read(argv, words="words")
        if args.help:
            reader.print_help()
            return 0
        request = Request.check(separate(args))
        quiet_libraries()
        model: TextToImage | None = None
        if request.model.is_file():  # only its weights tell what it is
            model = load(request, args)
        full = model.resolved(request.wanted) if model is not None else request.filled()
        voice.event("start", **_plain(full), model=str(request.model), dry_run=args.dry_run)
        if args.dry_run:
            tell(request.lora_reports(), voice)
            voice.note(request.summary(full))
            return 0
        model = load(request, args) if model is None else model
        # what is compared may change what the model answers: only the seed is settled
        each = variants(request.wanted, request.axes)[0] if request.axes else [full]
        steps = chain.from_iterable([model.run(one) for one in each])
        total = sum(_steps(model.resolved(one)) for one in each)
        tell(model.model.reports, voice)
        if args.seed is None:
            voice.note(f"seed {full.seed}")
    except ValueError as error:
        voice.trouble("error", str(error))
        return 2
    if request.axes or request.animation is not None:
        together(steps, request, full, args, voice, total)
    else:
        apart(steps, request, args, voice, total)
    if args.compile:
        voice.note(f"--compile: {model.model.compiled.report}")
    return 0


def tell(reports: Mapping[str, str], voice: "Voice") -> None:
    """How much of every LoRA has found its place."""
    for path, report in reports.items():
        voice.note(f"{path}: {report}")
        voice.event("lora", path=path, report=report)


def load(request: Request, args: Namespace) -> "TextToImage":
    """The model of a request, with all that is put on it."""
    from diffusion.pipeline import TextToImage

    return TextToImage.load(
        request.model,
        args.device,
        args.dtype,
        request.loras,
        control=args.control,
        lora_folder=args.lora_dir,
        prediction=args.prediction,
        compile=args.compile,
        offline=args.offline,
    )


def apart(steps: "Iterator[Progress]", request: Request, args: Namespace, voice: "Voice", total: int) -> None:
    """Write the pictures of each batch as soon as it is done, and at the end the sheet and the film of them."""
    from diffusion.images import save_image, slugify
    from diffusion.sheets import make_grid, save_film, save_sheet

    images: list[Image.Image] = []
    frames: list[Image.Image] = []

    def keep(image: "Image.Image", shot: Shot) -> Path:
        images.append(image)
        slug = slugify(shot.prompt)
        return save_image(image, request.output, seed=shot.seed, slug=slug, metadata=not args.no_metadata)

    draw(watched(steps, args, frames), keep, voice, total)
    if args.grid is not None:
        voice.picture(save_sheet(make_grid(images), args.grid), kind="grid")
    if args.film is not None:
        voice.picture(save_film([*frames, images[0]], args.film), kind="film")


def together(
    steps: "Iterator[Progress]", request: Request, full: Settings, args: Namespace, voice: "Voice", total: int
) -> None:
    """Draw everything, then write it as one file: a labelled sheet of what is compared, or an animation."""
    from diffusion.images import save_image, slugify
    from diffusion.sheets import make_table, save_film

    images: list[Image.Image] = []
    draw(watched(steps, args, []), lambda image, _: images.append(image), voice, total)
    facts = {"prompt": full.prompts[0], "seed": full.seed}
    if request.animation is not None:
        voice.picture(save_film(images, request.animation, len(images) / 8), kind="animation", **facts)
        return
    _, columns, rows = variants(request.wanted, request.axes)
    sheet = make_table(images, columns, rows)
    if not args.no_metadata:
        sheet.info.update(images[0].info)
    assert full.seed is not None, "filled() gave it"
    slug = slugify(full.prompts[0])
    path = save_image(sheet, request.output, seed=full.seed, slug=slug, metadata=not args.no_metadata)
    voice.picture(path, kind="comparison", **facts)


def watched(steps: "Iterator[Progress]", args: Namespace, frames: "list[Image.Image]") -> "Iterator[Progress]":
    """The same steps; after each one its preview is written or kept, if that was asked for."""
    from diffusion.sheets import make_grid, save_sheet

    for step in steps:
        if args.preview is not None:
            save_sheet(make_grid(step.preview()), args.preview)
        if args.film is not None:
            frames.append(step.preview()[0])
        yield step


def draw(steps: "Iterator[Progress]", keep: Keep, voice: "Voice", total: int) -> None:
    """Follow the steps, and give the pictures of each batch away as soon as it is done."""
    from tqdm import tqdm

    with tqdm(total=total, unit="step", leave=False, disable=True if voice.quiet or voice.json else None) as bar:
        for step in steps:
            bar.update()
            voice.event("step", index=step.index, total=step.total, seeds=step.seeds)
            for image, shot in zip(step.images, step.pictures, strict=True) if step.images else ():
                if image.getbbox() is None:
                    raise FloatingPointError(f"the picture of seed {shot.seed} came out black and was not saved")
                path = keep(image, shot)
                with bar.external_write_mode():
                    if path is not None:
                        voice.picture(path, prompt=shot.prompt, seed=shot.seed)


@dataclass(frozen=True)
class Voice:
    """How we speak: to a person, or with ``json`` to a program, in one event a line on stdout."""

    prog: str
    json: bool
    quiet: bool

    def event(self, kind: str, **facts: Any) -> None:
        """One event, for a program only."""
        if self.json:
            print(json.dumps({"event": kind, **facts}), flush=True)

    def note(self, text: str) -> None:
        """A word on stderr, for a person only."""
        if not self.json and not self.quiet:
            print(f"{self.prog}: {text}", file=sys.stderr)

    def trouble(self, kind: str, message: str) -> None:
        """A warning or an error: one line on stderr, and an event."""
        line = " ".join(message.split())
        print(f"{self.prog}: {line}", file=sys.stderr)
        self.event(kind, message=line)

    def picture(self, path: Path, **facts: Any) -> None:
        """A picture that was written: its path, or an event that holds it."""
        if self.json:
            self.event("image", path=str(path), **facts, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
        else:
            print(path, flush=True)


def reason(error: Exception) -> str:
    """A failure in one line: its first, and what to do where that is known."""
    text = next(iter(str(error).strip().splitlines()), "")
    if isinstance(error, MemoryError) or "out of memory" in text.lower() or "allocate memory" in text:
        return "out of memory: ask for --batch-size 1, or a smaller --size"
    return text if isinstance(error, OSError | FloatingPointError) else f"{type(error).__name__}: {text}"


def _steps(full: Settings) -> int:
    """Steps of all batches, as far as that is known before prompts are read."""
    assert full.batch_size is not None, "filled() gave it"
    return full.total_steps * -(-full.count // full.batch_size)


def _plain(full: Settings) -> dict[str, Any]:
    """The settings as JSON holds them."""
    facts = {item.name: getattr(full, item.name) for item in fields(full)}
    return facts | {name: str(facts[name]) for name in PICTURES if facts[name] is not None}
