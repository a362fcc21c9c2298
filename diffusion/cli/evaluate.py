"""``diffusion evaluate MODEL``: print how well a model draws what it is asked for."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from diffusion.cli.flags import Parser, only_model, whole

PARAPHRASES = Path("assets/emoji/paraphrases.jsonl")


def run(argv: Sequence[str]) -> int:
    """Parse, measure, print; exit code 0, or 2 for a request that cannot be met."""
    parser = Parser(prog="diffusion evaluate", description=__doc__)
    parser.add_argument("model", nargs="*", help="model folder or name (default: emoji)")
    parser.add_argument("--data", type=Path, default=Path("data/emoji"), help="image folder with a held_out split")
    parser.add_argument("--paraphrases", type=Path, default=PARAPHRASES, help="JSON lines of prompt and text")
    parser.add_argument("--count", type=whole, default=200, help="training captions to ask")
    parser.add_argument("--seed", type=whole, default=0, help="seed of the first picture and of the choice of captions")
    parser.add_argument("--device", default=None)
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--output", type=Path, help="folder for figures.json and a grid of every set")
    try:
        args = parser.read(argv, words="model")
        if args.help:
            parser.print_help()
            return 0
        name = only_model(args.model)
        if args.count < 1:
            raise ValueError(f"--count {args.count} is not at least 1")
    except ValueError as error:
        print(f"diffusion evaluate: {error}", file=sys.stderr)
        return 2
    from tqdm import tqdm

    from diffusion.data.source import read_folder
    from diffusion.evaluation import evaluate
    from diffusion.pipeline import TextToImage
    from diffusion.places import find_model

    try:
        find_model(name)
        if args.paraphrases != PARAPHRASES and not args.paraphrases.is_file():
            raise ValueError(f"{args.paraphrases}: no such file of paraphrases")
        for split in ("train", "held_out"):  # told before a model is loaded
            read_folder(args.data, split)
        model = TextToImage.load(name, args.device, args.dtype)
        paraphrases = args.paraphrases if args.paraphrases.is_file() else None
        with tqdm(desc="drawing", unit="img") as bar:
            figures = evaluate(model, args.data, paraphrases, args.count, args.seed, lambda: bar.update())
    except ValueError as error:
        print(f"diffusion evaluate: {error}", file=sys.stderr)
        return 2
    if args.output is not None:
        _write(figures, args.output)
    for name, count, value in figures.rows():
        print(f"{name:<42} {count:>5}  {value:>8}")
    return 0


def _write(figures, folder: Path) -> None:  # type: ignore[no-untyped-def]
    from diffusion.sheets import make_grid

    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"figure": name, "pictures": count, "value": value} for name, count, value in figures.rows()]
    (folder / "figures.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    for name in ("train", "held_out", "paraphrases"):
        answers = getattr(figures, name)
        if answers is not None:
            make_grid(answers.images, columns=16).save(folder / f"{name}.png")
