"""``diffusion export MODEL OUTPUT``: write a model as a folder or as one file, with LoRAs merged in, or rewrite a LoRA.

folder       a model folder, as train writes it and StableDiffusionPipeline.from_pretrained reads it
single-file  a checkpoint in the original format of Stable Diffusion 1.x, 2.x and XL
kohya        the one LoRA in kohya's names; of MODEL only the names of its layers are read
diffusers    the same in diffusers' names

Nothing is overwritten. The path that was written is printed.
"""

import os
import shutil
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion.cli.flags import Parser
from diffusion.names import DTYPES, resolve_dtype, unknown
from diffusion.places import base_of, parse_lora

if TYPE_CHECKING:
    import torch

FORMATS = ("folder", "single-file", "kohya", "diffusers")
SUFFIX = ".safetensors"


def run(argv: Sequence[str]) -> int:
    """Parse, check, write; exit code 0, or 2 for a request that cannot be met."""
    parser = Parser(prog="diffusion export", description=__doc__)
    parser.add_argument("words", nargs="*", metavar="MODEL OUTPUT", help="a folder, name, file or Hub id; and a path")
    parser.add_argument(
        "-l",
        "--lora",
        action="append",
        default=[],
        metavar="PATH[:W]",
        help="merge it in, so strongly; repeatable",
    )
    parser.add_argument("--format", help=f"{', '.join(FORMATS)} (default: by the ending of OUTPUT)")
    parser.add_argument("--dtype", help=f"of the weights: {', '.join(DTYPES)} (default: fp32; of a LoRA, its own)")
    parser.add_argument("--offline", action="store_true", help="look for a Hub id in the local cache alone")
    try:
        args = parser.read(argv, words="words")
        if args.help:
            parser.print_help()
            return 0
        request = Request.check(args)
        request.write()
    except (ValueError, OSError) as error:
        print(f"diffusion export: {error}", file=sys.stderr)
        return 2
    print(request.output)
    return 0


@dataclass(frozen=True)
class Request:
    """What was asked for, checked as far as that goes without any library."""

    model: str
    output: Path
    loras: list[tuple[str, float]]
    form: str
    dtype: str | None
    offline: bool

    @classmethod
    def check(cls, args: Namespace) -> "Request":
        """Raises ValueError for the first fault."""
        if len(args.words) != 2:
            raise ValueError(f"give a MODEL and an OUTPUT, not {len(args.words)} of them (--help tells more)")
        model, output = args.words[0], Path(args.words[1])
        form = args.format or ("single-file" if output.suffix == SUFFIX else "folder")
        if form not in FORMATS:
            raise unknown("format", form, FORMATS)
        if (output.suffix == SUFFIX) != (form != "folder"):
            raise ValueError(f"{output} is to be a {form}: {'end it in' if form != 'folder' else 'drop the'} {SUFFIX}")
        if output.exists():
            raise ValueError(f"{output} exists already, and nothing is overwritten")
        loras = [parse_lora(text) for text in args.lora]
        if form in ("kohya", "diffusers"):
            loras = _only_one(model, loras)
        return cls(model, output, loras, form, resolve_dtype(args.dtype, None), args.offline)

    def write(self) -> None:
        """Write the output, whole or not at all. ValueError for a model or a LoRA that cannot be written so."""
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # the only output is the path
        import torch

        from diffusion.loading import locate

        place = locate(self.model, offline=self.offline)
        dtype = None if self.dtype is None else getattr(torch, self.dtype)
        if self.form in ("kohya", "diffusers"):
            self._rewrite(place, dtype)
        else:
            self._merge(place, dtype)

    def _merge(self, place: Path, dtype: "torch.dtype | None") -> None:
        from diffusion import interop
        from diffusion.loading import read_model
        from diffusion.models import adapters, original
        from diffusion.models.folder import save_model

        if self.form == "single-file":
            original.family_of(interop.outline(place))  # told before any weights are read
        model = read_model(place)
        for path, strength in self.loras:
            adapters.apply(model, path, strength)
        model.recipe = replace(model.recipe, base="")  # what is written stands alone
        if self.form == "single-file":
            interop.save_single_file(model, self.output, dtype)
        else:
            _whole(self.output, lambda part: save_model(model, part, dtype))

    def _rewrite(self, place: Path, dtype: "torch.dtype | None") -> None:
        from diffusion import interop
        from diffusion.models import lora

        networks = {name: network for name, network in interop.outline(place).items() if name != "vae"}
        path = Path(self.loras[0][0])
        lora.rewrite(lora.read(path, networks), networks, self.output, self.form == "kohya", dtype)
        if (path / "words").is_dir():
            print(f"diffusion export: learnt words are no part of a LoRA and stay in {path}/words", file=sys.stderr)


def _only_one(model: str, loras: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """The LoRA to rewrite: the one that is given, or the model itself if it is a folder of adapters."""
    if not loras and base_of(Path(model)) is not None:
        return [(model, 1.0)]
    if len(loras) != 1:
        raise ValueError(f"one LoRA is rewritten at a time, not {len(loras)}: give it by --lora PATH")
    if loras[0][1] != 1:
        raise ValueError("a rewritten LoRA keeps its strength: give --lora PATH without a weight")
    return loras


def _whole(folder: Path, write: Any) -> None:
    """Write a folder beside its place, and move it there when it is whole."""
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # what an interrupted export has left
    try:
        write(part)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
