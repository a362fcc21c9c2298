"""The flags of ``generate.py``, and what they ask for once no more can be wrong with it than a library can tell."""

import argparse
import math
import os
import re
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion import comparison, names, places, settings
from diffusion.cli import again
from diffusion.cli.flags import Parser, interval, number, numbers, sides, size, whole, whole_or_auto
from diffusion.cli.outputs import Outputs, name_parts
from diffusion.names import SAMPLERS, SCHEDULES
from diffusion.safety import find_checker
from diffusion.settings import Settings

if TYPE_CHECKING:
    from PIL import Image

    from diffusion.drawing import Drawing
    from diffusion.pipeline import TextToImage
    from diffusion.records import Recalled

EXAMPLES = """examples:
  %(prog)s "a red apple"
  %(prog)s "a red apple" "a green apple" --num-images 4 --seed 7 --output apples/
  %(prog)s "a red apple" --sampler "DPM++ 2M" --steps 12 --output "apple-{seed}.png"
  %(prog)s "a green apple" --init-image apple.png --mask half.png
  %(prog)s --prompts rows.jsonl --output out/ --resume
  %(prog)s --from-image apple.png --steps 12
  %(prog)s panda --compare steps=5,10,20 cfg=1,3,7

Exit code: 0 done, 2 a request that cannot be met, 1 a failure while running, 130 interrupted.
"""
WORDS = dict.fromkeys(("sampler", "schedule", "negative_prompt"), str)  # fields to compare that are no numbers
KEEP, WITHHOLD = "keep", "withhold"
FLOATS = ("guidance_scale", "guidance_rescale", "strength", "hires_strength", "control_scale", "variation_strength")


@dataclass(frozen=True)
class Request:
    """What was asked for, once no more can be wrong with it than a library can tell."""

    args: Namespace
    wanted: Settings
    model: Path
    loras: dict[str, float]
    axes: dict[str, list[Any]]
    outputs: Outputs
    made: "Recalled | None"  # the picture that is drawn again

    @classmethod
    def check(cls, args: Namespace) -> "Request":
        """Check everything that needs no library but, at the end, Pillow. Raises ValueError for the first fault."""
        if args.wildcards is not None or args.resume:
            flag = "--resume" if args.resume else "--wildcards"
            raise ValueError(f"{flag} is for the prompts of a list: give --prompts as well")
        loras, made = check_call(args), None
        if args.from_image is None:
            wanted = Settings(prompts=(*args.words, *args.prompt), **fields_of(args)).seeded()
        else:
            made = again.ask(args, given_of(args))
            args, wanted, loras = again.settled(args, made), made.settings.seeded(), dict(made.loras)
        check_pictures(args, wanted)
        axes = _axes(args.compare)
        if axes:
            comparison.variants(wanted, axes)
        model = find_model(args.model, offline=args.offline)
        if (places.base_of(model) or model).is_dir():  # of a file only its header tells
            wanted.check(places.read_limits(model))
        outputs = Outputs.check(args, wanted, bool(axes))
        check_checker(args)
        return cls(args, wanted, model, loras, axes, outputs, made)

    @property
    def is_small(self) -> bool:
        """Whether its weights are read as soon as its outline is, so that the outline is not worth making."""
        from diffusion.loading import SMALL, count_weights

        return count_weights(self.model) < SMALL

    def cells(self) -> list[Settings]:
        """The call, or what is compared: each may have other answers of the model's own."""
        return comparison.variants(self.wanted, self.axes)[0] if self.axes else [self.wanted]

    def load(self, loaded: "dict[str, TextToImage]", *, weights: bool = True) -> "TextToImage":
        """The model with all that is put on it; without weights it is there in a moment, and draws nothing.

        One that was ``loaded`` for another picture is taken again.
        """
        args = self.args
        machine = (args.device, args.dtype, args.control, args.lora_dir, args.prediction, weights)
        key = repr((self.model, self.loras, machine))
        if key not in loaded:
            loaded[key] = load_model(args, self.model, self.loras, weights=weights)
        return loaded[key]

    def summary(self, plans: "Sequence[Drawing]") -> Iterator[str]:
        """What would be drawn, in a line, and of each prompt how the encoder reads it."""
        full, axes = plans[0].full, [f"{k} {', '.join(map(comparison.label, v))}" for k, v in self.axes.items()]
        count = sum(plan.full.count for plan in plans)
        pictures = "1 picture" if count == 1 else f"{count} pictures in batches of {full.batch_size}"
        model = " + ".join([str(self.model), *(f"{path}:{strength:g}" for path, strength in self.loras.items())])
        first = f"{' by '.join(axes)}, the first in " if axes else ""
        size, where = "{}x{}".format(*full.finished), ", ".join(self.outputs.places(**name_parts(full)))
        yield f"would draw {pictures}, {size}, with {model}: {first}{how(full)}, seed {full.seed}, to {where}"
        yield f"memory: {memory_of(max(plans, key=pixels_at_once))}"
        for written, line in counted(plans).items():
            yield f"{written!r}: {line}"


def counted(plans: "Sequence[Drawing]") -> dict[str, str]:
    """Of each prompt how many tokens it has, and where chunks of them end."""
    from diffusion.models.text import count_line

    return {
        written: count_line(plan.model, prompt, long=plan.full.long_prompts)
        for plan in plans
        for written, prompt in plan.words.prompts.items()
        if written
    }


def pixels_at_once(plan: "Drawing") -> int:
    """Of a batch."""
    assert isinstance(plan.full.batch_size, int), "plan() gives the batch size"
    width, height = plan.full.finished
    return width * height * min(plan.full.batch_size, plan.full.count)


def memory_of(plan: "Drawing") -> str:
    """What a plan takes, in words."""
    from diffusion.memory import drawing_bytes

    return str(drawing_bytes(plan.model, plan.full, plan.chunks, plan.control))


def how(full: Settings) -> str:
    """Steps, with what a picture to begin from and drawing again make of them, and guidance."""
    assert full.steps is not None, "filled() gave them"
    grid = f"on {full.schedule}" if full.sigmas is None else "at the sigmas given"
    last = "" if full.strength in (None, 1) else f", the last of {round(full.steps / full.strength)}"
    again = "" if full.hires_strength is None else f", and again the last of {round(full.steps / full.hires_strength)}"
    low, high = full.guidance_interval or (None, None)
    where = "" if low is None else f" from {low:g} to {math.inf if high is None else high:g}"
    return f"{full.steps} steps of {full.sampler} {grid}{last}{again}, guidance {full.guidance_scale:g}{where}"


def check_loras(given: Sequence[str]) -> dict[str, float]:
    """What is put on the model, and how strongly. ValueError for one that is given twice."""
    found = [places.parse_lora(text) for text in given]
    paths = [os.path.realpath(path) for path, _ in found]
    for path, (written, _) in zip(paths, found, strict=True):
        if paths.count(path) > 1:
            raise ValueError(f"--lora {written} is given twice: give it one weight")
    return dict(found)


def _axes(given: Sequence[tuple[str, list[Any]]] | None) -> dict[str, list[Any]]:
    """What is compared. ValueError for a field that is given twice."""
    names = [comparison.COMPARED[name] for name, _ in given or ()]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"--compare has {name} twice: give all of its values at once")
    return dict(given or ())


def find_model(name: str, *, offline: bool) -> Path:
    """Where a model is; only a Hub id, which is nowhere on disk, needs a library to be found."""
    try:
        return places.find_model(name)
    except ValueError:
        if not places.is_hub_id(name):
            raise
    from diffusion.models.hub import find_on_hub

    try:
        return places.find_model(find_on_hub(name, offline))
    except ValueError as error:
        raise ValueError(f"there is no folder or file {name} here, and {error}") from None


def fields_of(args: Namespace) -> dict[str, Any]:
    """What the flags say of the fields of ``Settings``, but for the prompts; the defaults of those they do not give."""
    return {name: value for name, value in settings.DEFAULTS.items() if name != "prompts"} | given_of(args)


def given_of(args: Namespace) -> dict[str, Any]:
    """The fields of ``Settings`` that flags give, but for the prompts: a flag that is left out is None."""
    given = {item.name: getattr(args, item.name) for item in fields(Settings) if item.name != "prompts"}
    if args.size is not None:
        if args.width is not None or args.height is not None:
            raise ValueError("--size and --width/--height say the same thing: give one of them")
        given["width"], given["height"] = args.size
    return {name: value for name, value in given.items() if value is not None}


def check_call(args: Namespace) -> dict[str, float]:
    """What is wrong whatever is drawn; the LoRAs, and how strong each is."""
    names.check_device(args.device)
    names.resolve_dtype(args.dtype, args.device)
    names.resolve_prediction(args.prediction)
    return check_loras(args.lora)


def check_checker(args: Namespace) -> None:
    """That a checker is there. It is read, which runs what is in it: not before all else is right."""
    if args.checker is None and args.flagged is not None:
        raise ValueError("--flagged is about what a checker flags: give --checker as well")
    if args.flagged == WITHHOLD and args.preview is not None:
        raise ValueError("--preview is written before a picture is checked, and --flagged withhold: leave one out")
    if args.checker is not None:
        find_checker(args.checker)


def withheld(args: Namespace, image: "Image.Image") -> bool:
    """Whether a picture is not to be written, for its checker flags it."""
    return args.flagged == WITHHOLD and "flagged" in image.info


def check_pictures(args: Namespace, wanted: Settings) -> None:
    """That the pictures that are read are there, and a ControlNet where it has one."""
    if (args.control is None) != (wanted.control_image is None):
        raise ValueError("--control and --control-image belong together: a ControlNet and a picture to lead by")
    for name in settings.PICTURES:
        if getattr(wanted, name) is not None:
            settings.sides_of(getattr(wanted, name))


def load_model(args: Namespace, model: Path, loras: dict[str, float], *, weights: bool) -> "TextToImage":
    """A model as the flags ask for it."""
    from diffusion.pipeline import TextToImage

    return TextToImage.load(
        model,
        args.device,
        args.dtype,
        loras,
        control=args.control,
        lora_folder=args.lora_dir,
        prediction=args.prediction,
        compile=args.compile,
        offload=args.offload,
        offline=args.offline,
        checker=None if args.checker is None else find_checker(args.checker),
        weights=weights,
    )


def compared(text: str) -> tuple[str, list[Any]]:
    """``steps=10,20,50`` as a field and its values."""
    name, equals, values = text.partition("=")
    field = comparison.COMPARED.get(name.replace("-", "_"))
    if not equals or field is None:
        known = ", ".join(dict.fromkeys(comparison.COMPARED.values()))
        raise argparse.ArgumentTypeError(f"{text!r} is not FIELD=VALUE,VALUE with one of the fields {known}")
    kind: Callable[[str], Any] = WORDS.get(field, number if field in FLOATS else whole)
    return name.replace("-", "_"), [kind(value.strip()) for value in values.split(",")]


def separate(args: Namespace) -> Namespace:
    """A prompt that came behind the values of --compare is a prompt; and where no picture names a model, ours draws."""
    if args.model is None and args.from_image is None:
        args.model = "emoji"
    taken: Sequence[str] = args.compare or ()
    try:
        args.compare = [compared(word) for word in taken if re.match(r"[a-z][a-z_-]*=", word)]
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"--compare: {error}") from None
    args.words = [*args.words, *(word for word in taken if not re.match(r"[a-z][a-z_-]*=", word))]
    if taken and not args.compare:
        raise ValueError("--compare needs a field and its values: steps=10,20,50")
    return args


def parser(prog: str) -> Parser:
    """Every flag, named as the field of ``Settings`` that it gives. One left out is None where the model answers it."""
    made = Parser(
        prog=prog,
        usage="%(prog)s PROMPT ... [flags]",
        description="Make pictures from text. Every flag may be written with - or _.",
        epilog=EXAMPLES,
    )
    own = "default: the model's own"
    for title, add_all in (
        ("what is drawn", _add_words),
        ("how", _add_how),
        ("which pictures", _add_which),
        ("from a picture", _add_pictures),
        ("where it goes", _add_outputs),
        ("the machine", _add_machine),
    ):
        add_all(made.add_argument_group(title).add_argument, own)
    return made


def _add_words(add: Callable[..., Any], own: str) -> None:
    add("words", metavar="PROMPT", nargs="*", help="what to draw; several prompts make several pictures")
    add("-p", "--prompt", action="append", default=[], help="one more prompt; may be repeated")
    add("--prompts", type=Path, metavar="FILE", help="a list, a row a picture: .txt, .jsonl or .csv, with own settings")
    add("--resume", action="store_true", help="of the list only what its manifest does not hold as done")
    add("--wildcards", type=Path, metavar="DIR", help="of a list: where __name__ finds its lines (wildcards/)")
    add("-n", "--negative-prompt", metavar="TEXT", help="what to keep away from")
    switch = partial(add, action="store_true", default=None)
    switch("--literal", help="take (brackets:1.2), BREAK and <lora:...> in prompts as text")
    switch("--long-prompts", help="read more than the encoder was made for, in chunks")
    add("--clip-skip", type=whole, metavar="N", help="layer of the text encoder: 2 is the last but one")
    add("-m", "--model", help="folder, .safetensors file, Hub id or shipped model (emoji, emoji-fast)")
    add("--prediction", metavar="KIND", help="epsilon or v, for a file that does not say what its network puts out")
    add("--lora", action="append", default=[], metavar="PATH[:W]", help="LoRA or learnt word, W strong; repeatable")
    add("--lora-dir", type=Path, metavar="DIR", help="where <lora:name:0.8> looks (loras/)")
    add("--offline", action="store_true", help="never ask a network for a model")


def _add_how(add: Callable[..., Any], own: str) -> None:
    add("--steps", type=whole, help=f"denoising steps ({own})")
    add("--guidance-scale", "--cfg", "--cfg-scale", type=number, metavar="SCALE", help=f"1 turns it off ({own})")
    add("--guidance-rescale", type=number, metavar="SHARE", help="against burnt contrast, about 0.7")
    add("--guidance-interval", type=interval, metavar="LOW,HIGH", help="guide only at these sigma / alpha")
    add("--sampler", help=f"{', '.join(SAMPLERS)} ({own})")
    add("--schedule", help=f"{', '.join(SCHEDULES)} ({own})")
    add("--sigmas", type=numbers, metavar="S,S,...", help="sigma / alpha of every step, in place of a schedule")
    add("--tile", metavar="x|y|xy", help="edges that fit each other")


def _add_which(add: Callable[..., Any], own: str) -> None:
    add("-s", "--seed", type=whole, help="seed of the first picture; picture k has seed + k (default: drawn)")
    add("-W", "--width", type=whole, help=f"in pixels ({own})")
    add("-H", "--height", type=whole, help=f"in pixels ({own})")
    add("--size", type=size, metavar="WxH", help="both at once, for instance 128x64")
    add("--num-images", type=whole, metavar="N", help="pictures of each prompt (default: 1)")
    add("--batch-size", type=whole_or_auto, metavar="N", help="pictures drawn at once; auto: as many as memory holds")
    add("--variation-seed", type=whole, metavar="SEED", help="vary the picture of --seed towards this one, + k")
    add("--variation-strength", type=number, metavar="SHARE", help="how far, 0 to 1")
    add("--to-prompt", metavar="TEXT", help="pictures on the way from the prompt to this one")
    add("--to-seed", type=whole, metavar="SEED", help="and from the noise of --seed to that of this one")
    add("--frames", type=whole, metavar="N", help="how many on the way; -o way.gif makes one animation of them")
    add("--share", type=number, help="or the one this far, 0 to 1")
    add(
        "--compare",
        nargs="+",
        action="extend",
        metavar="FIELD=V,V",
        help="one labelled sheet: steps=10,20,50 cfg=3,5,7",
    )


def _add_pictures(add: Callable[..., Any], own: str) -> None:
    add("--from-image", nargs="+", action="extend", metavar="FILE", help="draw these again; flags change what they say")
    add("-i", "--init-image", metavar="FILE", help="begin from this picture")
    add("--strength", type=number, help="how much of it is drawn anew, up to 1 (0.75; with a mask 1)")
    add("--mask", metavar="FILE", help="white is drawn anew, black stays to the last bit")
    add("--mask-blur", type=number, metavar="PIXELS", help="how softly, inside the mask (4)")
    add("--extend", type=sides, metavar="left=64,...", help="draw beyond the edges: left, top, right, bottom")
    add("--hires", type=number, metavar="TIMES", help="draw it again so many times as large")
    add("--hires-strength", type=number, metavar="SHARE", help="how much of that anew (0.5)")
    add("--control", metavar="DIR", help="a ControlNet's folder, which leads by")
    add("--control-image", metavar="FILE", help="this picture of edges, depth, poses ...")
    add("--control-scale", type=number, metavar="SCALE", help="how strongly (1)")


def _add_outputs(add: Callable[..., Any], own: str) -> None:
    switch = partial(add, action="store_true")
    add(
        "-o",
        "--output",
        metavar="PATH",
        help="file (overwritten), folder/ or template of {index} {seed} {slug} (outputs/)",
    )
    add("--grid", type=Path, metavar="FILE", help="all pictures on one sheet as well")
    add("--preview", type=Path, metavar="FILE", help="what it looks like so far, after every step")
    add("--film", type=Path, metavar="FILE", help="how it came about: an animation (.gif) or a strip (.png)")
    add("--checker", metavar="WHERE", help="look at pictures: module:function, file.py:function or a stock folder")
    add("--flagged", choices=(KEEP, WITHHOLD), help="write what it flags and say so, or do not write it (keep)")
    switch("--json", help="one JSON event a line on stdout: start, step, image, error, done ...")
    switch("--dry-run", help="check the request, say what would be drawn, and stop")
    switch("--verify", help="compare with --from-image and write nothing; exit code 0 only if no pixel differs")
    switch("--no-metadata", help="leave out how the picture was made")
    switch("--quiet", help="no progress bar, no notes")


def _add_machine(add: Callable[..., Any], own: str) -> None:
    add("--device", help="auto, cpu, cuda, cuda:1, mps, xpu (default: auto)")
    add("--compile", action="store_true", help="compile the U-Net: a minute at first, faster from then on")
    add("--vae-tiling", type=whole, metavar="PIXELS", help="decode in tiles of 512: large pictures in less memory")
    add("--offload", action="store_true", help="on a GPU keep only the network that is at work")
    add("--dtype", help="fp32, bf16 or fp16 (default: what the machine is fast at; small models fp32)")


def quiet_libraries() -> None:
    """Tell libraries, before they are imported, that everything is on disk and that the bar is ours."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
