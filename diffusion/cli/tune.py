"""``diffusion tune MODEL``: find the fewest steps that draw as well as many do, and write them into the recipe."""

import sys
from collections.abc import Sequence
from pathlib import Path

from diffusion.cli.flags import Parser, only_model, whole


def run(argv: Sequence[str]) -> int:
    """Parse, measure, write; exit code 0, or 2 for a request that cannot be met."""
    parser = Parser(prog="diffusion tune", description=__doc__)
    parser.add_argument("model", nargs="*", help="model folder or name (default: emoji)")
    parser.add_argument("--data", type=Path, default=Path("data/emoji"), help="the folder that it was trained on")
    parser.add_argument("--count", type=whole, default=100, help="captions to ask (default: %(default)s)")
    parser.add_argument("--seed", type=whole, default=1, help="of the choice of captions, and of the first picture")
    parser.add_argument("--dry-run", action="store_true", help="measure, and leave recipe.json as it is")
    try:
        args = parser.read(argv, words="model")
        if args.help:
            parser.print_help()
            return 0
        _tune(only_model(args.model), args.data, args.count, args.seed, args.dry_run)
    except (ValueError, OSError) as error:
        print(f"diffusion tune: {error}", file=sys.stderr)
        return 2
    return 0


def _tune(name: str, data: Path, count: int, seed: int, dry_run: bool) -> None:
    from dataclasses import asdict

    from diffusion.data.source import read_folder
    from diffusion.models.folder import write_json
    from diffusion.pipeline import TextToImage
    from diffusion.places import ADAPTERS, find_model
    from diffusion.tuning import Trial, table, tune

    folder = find_model(name)
    if folder.is_file():
        raise ValueError(f"{folder} is one file and has no recipe.json: export it as a folder first")
    read_folder(data, "train")  # told before a model is loaded
    trials: list[Trial] = []

    def tell(trial: Trial) -> None:
        trials.append(trial)
        print(table([trial]), flush=True)

    model = TextToImage.load(folder)
    best = tune(model, data, count, seed, tell)
    print(f"\n{table([best])}  is as good as {table(trials[:1])}")
    if not dry_run:
        write_json(folder / ADAPTERS, asdict(model.model.recipe))
