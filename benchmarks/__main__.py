"""``python -m benchmarks [drawing starting training ...] [--rounds 7] [--json FILE]``: print the table of figures."""

import argparse
import json
import sys
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

NAMES = ("drawing", "quality", "training", "starting", "scaling")


def main() -> int:
    """Exit code 0, or 2 for a benchmark that there is not."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which (default: all): {', '.join(NAMES)}")
    parser.add_argument("--rounds", type=int, default=7, help="rounds that count (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    parser.add_argument("--quick", action="store_true", help="leave out what is compiled, and 512x512")
    parser.add_argument("--peer-script", type=Path, help="a train_text_to_image.py to time instead of our retelling")
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in NAMES]
    if unknown:
        print(f"benchmarks: unknown benchmark {unknown[0]!r} (there are {', '.join(NAMES)})", file=sys.stderr)
        return 2
    import torch

    from benchmarks.table import render
    from diffusion.precision import processor

    machine = {"processor": processor(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    print(", ".join(f"{name}: {value}" for name, value in machine.items()), file=sys.stderr)
    rows = []
    for name in args.names or NAMES:
        extra = {"training": {"peer_script": args.peer_script}, "drawing": {"quick": args.quick}}.get(name, {})
        rows += import_module(f"benchmarks.{name}").rows(args.rounds, **extra)
    print(render(rows))
    if args.json is not None:
        args.json.write_text(json.dumps({"machine": machine, "rows": [asdict(row) for row in rows]}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
