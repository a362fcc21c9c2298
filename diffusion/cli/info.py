"""``diffusion info [MODEL or PICTURE]``: describe the installation, a model folder, or how a picture was made."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def run(argv: Sequence[str]) -> int:
    """Print JSON; exit code 0, or 2 for something that is neither a model nor a picture."""
    parser = argparse.ArgumentParser(prog="diffusion info", description=__doc__)
    parser.add_argument("what", nargs="?", help="model folder, model name or picture; nothing: this installation")
    args = parser.parse_args(argv)
    try:
        found = _installation() if args.what is None else _described(args.what)
    except ValueError as error:
        print(f"diffusion info: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found, indent=2, ensure_ascii=False))
    return 0


def _described(what: str) -> Any:
    if Path(what).is_file():
        from diffusion.images import read_metadata

        return read_metadata(what)
    from diffusion.settings import find_model

    folder = find_model(what)
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
