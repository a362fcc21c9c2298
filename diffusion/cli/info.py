"""``diffusion info [MODEL or PICTURE ...]``: describe the installation, a model, or how a picture was made."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusion import places
from diffusion.cli.flags import Parser
from diffusion.cli.outputs import SHEETS
from diffusion.cli.voice import unmet


def run(argv: Sequence[str]) -> int:
    """Print JSON; exit code 0, or 2 for something that is neither a model nor a picture."""
    parser = Parser(prog="diffusion info", description=__doc__)
    parser.add_argument("what", nargs="*", help="model folders, model names or pictures; nothing: this installation")
    try:
        args = parser.read(argv, words="what")
        if args.help:
            parser.print_help()
            return 0
        found = [_described(one) for one in args.what] or [_installation()]
    except (PermissionError, ValueError) as error:
        print(f"diffusion info: {unmet(error)}", file=sys.stderr)
        return 2
    print(json.dumps(found if len(found) > 1 else found[0], indent=2, ensure_ascii=False))
    return 0


def _described(what: str) -> Any:
    if Path(what).suffix.lower() == places.SINGLE_FILE:
        from diffusion.interop import describe

        return describe(what)
    if Path(what).is_file() or (Path(what).suffix.lower() in SHEETS and not Path(what).is_dir()):
        from diffusion.foreign import shown
        from diffusion.images import read_metadata, read_texts
        from diffusion.records import silence

        found = shown(read_texts(what)[0]) | read_metadata(what)
        if not found:
            print(f"diffusion info: {silence(what)}", file=sys.stderr)
        return found
    folder = places.find_model(what)
    files = ("recipe.json", "unet/config.json", "vae/config.json", "scheduler/scheduler_config.json")
    return {"path": str(folder)} | {
        name: json.loads((folder / name).read_text()) for name in files if (folder / name).is_file()
    }


def _installation() -> dict[str, Any]:
    from importlib.metadata import version

    import torch

    from diffusion import __version__
    from diffusion.precision import fast_dtype

    device = "cuda" if torch.cuda.is_available() else "cpu"
    packages = ("torch", "diffusers", "transformers", "accelerate", "pillow", "numpy")
    return {
        "diffusion": __version__,
        "device": device,
        "fast dtype": str(fast_dtype(device)).removeprefix("torch."),
        **{package: version(package) for package in packages},
    }
