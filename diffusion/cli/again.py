"""``--from-image``: a picture drawn again by what it says of itself, with whatever flags change in it. No torch."""

import os
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion.cli.outputs import SHEETS
from diffusion.comparison import COMPARED
from diffusion.names import resolve_sampler
from diffusion.places import parse_lora
from diffusion.settings import DEFAULTS
from diffusion.values import no_address

if TYPE_CHECKING:
    from diffusion.records import Recalled

READ = (*SHEETS, ".gif", ".bmp", ".tif", ".tiff")  # what pictures that can be read end in
ALONE = ("prompts", "wildcards")  # flags that say the same thing as a picture: what is to be drawn
ONE = ("grid", "film", "preview", "compare")  # flags that make of pictures what there is nothing to compare with


def apart(args: Namespace) -> list[Namespace]:
    """The call once for each picture that is to be drawn again; what came behind a picture and is none is a prompt."""
    taken: list[str] = args.from_image or []
    _refuse_pictures(args)
    pictures = [word for word in taken if Path(word).suffix.lower() in SHEETS or os.path.isfile(word)]
    args.words = [*args.words, *(word for word in taken if word not in pictures)]
    if not taken and args.verify:
        raise ValueError("--verify compares a picture with what it says of itself: give --from-image")
    if taken and not pictures:
        raise ValueError(f"--from-image {taken[0]} is no picture: give a {', '.join(SHEETS)} that says how it was made")
    for flag in (*(ALONE if taken else ()), *(ONE if args.verify else ())):
        if getattr(args, flag):
            raise ValueError(
                f"--{flag} has no place beside --{'verify' if flag in ONE else 'from-image'}: leave it out"
            )
    return [Namespace(**vars(args) | {"from_image": Path(no_address("from_image", one))}) for one in pictures] or [args]


def _refuse_pictures(args: Namespace) -> None:
    """ValueError for a picture where a prompt is to be: the flag in front of it was forgotten."""
    for word in args.words:
        if Path(word).suffix.lower() in READ and os.path.isfile(word):
            begin = "" if args.verify else f"--init-image {word} to begin from it, or "
            again = f"--from-image {word} to draw it again{' and compare it' if args.verify else ''}"
            raise ValueError(f"{word} is a picture and no prompt: give {begin}{again}")


def ask(args: Namespace, given: Mapping[str, Any]) -> "Recalled":
    """What a picture says of itself, with what flags give in place of it; what is compared has no value of its own."""
    from diffusion.records import recall

    words = (*args.words, *args.prompt)
    axes = {COMPARED[name]: DEFAULTS[COMPARED[name]] for name, _ in args.compare or ()}
    samplers = [value for name, values in args.compare or () for value in values if name == "sampler"]
    free = {"schedule": None} if any(resolve_sampler(name)[1] for name in samplers) else {}
    made = recall(
        args.from_image,
        model=args.model,
        loras=dict(map(_lora, args.lora)),
        lora_folder=args.lora_dir,
        control=args.control,
        prediction=args.prediction,
        device=args.device,
        dtype=args.dtype,
        **{**free, **axes, **given, **({"prompts": words} if words else {})},
    )
    if args.verify and made.settings.count != 1:
        raise ValueError(f"--verify compares one picture, and {made.settings.count} are to be drawn")
    return made


def _lora(text: str) -> tuple[str, float | None]:
    """A LoRA and its strength, None where the flag does not say it: then the picture may."""
    path, strength = parse_lora(text)
    return path, None if path == text else strength


def settled(args: Namespace, made: "Recalled") -> Namespace:
    """The flags as if everything that the picture says had been given."""
    names = ("control", "prediction", "device", "dtype")
    found = {name: made.options[name] for name in names} | {"model": str(made.model), "seed": made.settings.seed}
    return Namespace(**vars(args) | found)
