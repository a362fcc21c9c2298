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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion import settings
from diffusion.cli.flags import Parser, number, size, whole
from diffusion.settings import SAMPLERS, SCHEDULES, Settings

if TYPE_CHECKING:
    from diffusion.images import Output
    from diffusion.pipeline import Progress

EXAMPLES = """examples:
  %(prog)s "a red apple"
  %(prog)s "a red apple" "a green apple" --num-images 4 --seed 7 --output apples/
  %(prog)s "a red apple" --sampler "DPM++ 2M" --steps 12 --output "apple-{seed}.png"

Exit code: 0 done, 2 a request that cannot be met, 1 a failure while running, 130 interrupted.
"""


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
        request = Request.check(args)
        wanted = request.filled()
        voice.event("start", **asdict(wanted), model=str(request.folder), dry_run=args.dry_run)
        if args.dry_run:
            voice.note(request.summary(wanted))
            return 0
        from diffusion.pipeline import TextToImage

        steps = TextToImage.load(request.folder, args.device, args.dtype, request.loras).run(wanted)
        if args.seed is None:
            voice.note(f"seed {wanted.seed}")
    except ValueError as error:
        voice.trouble("error", str(error))
        return 2
    assert wanted.steps is not None and wanted.batch_size is not None  # noqa: PT018 - filled() gave them
    total = wanted.steps * -(-wanted.count // wanted.batch_size)
    draw(steps, request.output, voice, total=total, metadata=not args.no_metadata)
    return 0


def draw(steps: "Iterator[Progress]", output: "Output", voice: "Voice", *, total: int, metadata: bool) -> None:
    """Follow the steps, and write the pictures of each batch as soon as it is done."""
    from tqdm import tqdm

    from diffusion.images import save_image, slugify

    with tqdm(total=total, unit="step", leave=False, disable=True if voice.quiet or voice.json else None) as bar:
        for step in steps:
            bar.update()
            voice.event("step", index=step.index, total=step.total, seeds=[seed for _, seed in step.pictures])
            for image, (prompt, seed) in zip(step.images, step.pictures, strict=True) if step.images else ():
                if image.getbbox() is None:
                    raise FloatingPointError(f"the picture of seed {seed} came out black and was not saved")
                path = save_image(image, output, seed=seed, slug=slugify(prompt), metadata=metadata)
                with bar.external_write_mode():
                    voice.picture(path, prompt=prompt, seed=seed)


@dataclass(frozen=True)
class Request:
    """What was asked for, once no more can be wrong with it than the length of a prompt."""

    wanted: Settings
    folder: Path
    loras: dict[str, float]
    output: "Output"

    @classmethod
    def check(cls, args: Namespace) -> "Request":
        """Check everything that needs no library but, at the end, Pillow. Raises ValueError for the first fault."""
        given = {item.name: getattr(args, item.name) for item in fields(Settings) if item.name != "prompts"}
        if args.size is not None:
            if args.width is not None or args.height is not None:
                raise ValueError("--size and --width/--height say the same thing: give one of them")
            given["width"], given["height"] = args.size
        wanted = Settings(prompts=(*args.words, *args.prompt), **given).seeded()
        settings.check_device(args.device)
        settings.resolve_dtype(args.dtype, args.device)
        folder = settings.find_model(args.model)
        loras = dict(settings.parse_lora(text) for text in args.lora)
        wanted.check(settings.read_limits(folder))

        from diffusion.images import check_output, parse_output, slugify

        output = parse_output(args.output)
        longest = max(map(slugify, wanted.prompts), key=lambda slug: len(slug.encode()))
        assert wanted.seed is not None, "seeded() gave it"
        check_output(output, wanted.count, wanted.seed, longest)
        return cls(wanted, folder, loras, output)

    def filled(self) -> Settings:
        """The request with the model's own defaults. ValueError for a prompt longer than the encoder reads.

        Reads the tokenizer and the recipe only, so that a long prompt is answered before the weights are loaded.
        """
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is on disk: never wait for a network
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # there is one bar, and it is ours
        from diffusion.models.folder import read_recipe
        from diffusion.models.text import read_tokenizers, tokenize

        full = self.wanted.filled(read_recipe(self.folder))
        full.check(settings.read_limits(self.folder))
        if not self.loras and settings.base_of(self.folder) is None:  # which may teach the tokenizer words
            tokenize(read_tokenizers(self.folder), [*full.prompts, full.negative_prompt])
        return full

    def summary(self, full: Settings) -> str:
        """What would be drawn, in a line."""
        pictures = "1 picture" if full.count == 1 else f"{full.count} pictures in batches of {full.batch_size}"
        model = " + ".join([str(self.folder), *(f"{path}:{strength:g}" for path, strength in self.loras.items())])
        return (
            f"would draw {pictures}, {full.width}x{full.height}, with {model}: {full.steps} steps of "
            f"{full.sampler} on {full.schedule}, guidance {full.guidance_scale:g}, seed {full.seed}, "
            f"to {self.output.template}"
        )


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


def parser(prog: str) -> Parser:
    """Every flag, named as the field of ``Settings`` that it gives. One left out is None where the model answers it."""
    made = Parser(
        prog=prog,
        usage="%(prog)s PROMPT ... [flags]",
        description="Make pictures from text. Every flag may be written with - or _.",
        epilog=EXAMPLES,
    )
    own = "default: the model's own"
    add: Callable[..., Any] = made.add_argument
    switch = partial(add, action="store_true")
    add("words", metavar="PROMPT", nargs="*", help="what to draw; several prompts make several pictures")
    add("-p", "--prompt", action="append", default=[], help="one more prompt; may be repeated")
    add("-n", "--negative-prompt", default="", metavar="TEXT", help="what to keep away from")
    add("-m", "--model", default="emoji", help="model folder, or the name of a shipped model (default: %(default)s)")
    add("--lora", action="append", default=[], metavar="PATH[:W]", help="LoRA or learnt word, W strong; repeatable")
    add("-o", "--output", metavar="PATH", help="file, folder/ or template with {index} {seed} {slug} (outputs/)")
    add("-s", "--seed", type=whole, help="seed of the first picture; picture k has seed + k (default: drawn)")
    add("--steps", type=whole, help=f"denoising steps ({own})")
    add("--guidance-scale", "--cfg", "--cfg-scale", type=number, metavar="SCALE", help=f"1 turns it off ({own})")
    add("--sampler", help=f"{', '.join(SAMPLERS)} ({own})")
    add("--schedule", help=f"{', '.join(SCHEDULES)} ({own})")
    add("-W", "--width", type=whole, help=f"in pixels ({own})")
    add("-H", "--height", type=whole, help=f"in pixels ({own})")
    add("--size", type=size, metavar="WxH", help="both at once, for instance 128x64")
    add("--num-images", type=whole, default=1, metavar="N", help="pictures of each prompt (default: 1)")
    add(
        "--batch-size",
        type=whole,
        metavar="N",
        help="pictures drawn at once (default: what fits)",
    )
    add("--device", help="auto, cpu, cuda, cuda:1, mps, xpu (default: auto)")
    add("--dtype", help="fp32, bf16 or fp16 (default: bf16 on a GPU that has it, else fp32)")
    switch("--json", help="one JSON event a line on stdout: start, step, image, warning, error")
    switch("--dry-run", help="check the request, say what would be drawn, and stop")
    switch("--no-metadata", help="leave out how the picture was made")
    switch("--quiet", help="no progress bar, no notes")
    return made
