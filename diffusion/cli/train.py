"""``diffusion train CONFIG.yaml [key=value ...]``: train a model, or go on where the run of that name stopped."""

import gc
import os
import sys
from collections.abc import Sequence
from typing import TextIO

USAGE = """usage: train.py CONFIG.yaml [--dry-run] [key=value ...]

Train what the config says into runs/<name>/; the same command again goes on where it stopped.
--dry-run says what would be done, and writes nothing.
Overrides: train.lr=3e-4, --train.lr=3e-4 and --train.lr 3e-4 mean the same.
Several processes: accelerate launch --config_file configs/accelerate/ddp.yaml --num_processes 2 train.py CONFIG.yaml
"""


def run(argv: Sequence[str]) -> int:
    """Exit code 0 when done, 2 for a wrong request, 1 for a failure while running, 130 when stopped by a signal."""
    from diffusion import config

    if not argv or "-h" in argv or "--help" in argv:
        rows = "\n".join(f"  {path:<28} {doc} [{default}]" for path, default, doc in config.documented_fields())
        print(f"{USAGE}\nFields and their defaults:\n{rows}")
        return 0 if argv else 2
    try:
        dry_run = "--dry-run" in argv
        argv = [word for word in argv if word != "--dry-run"]
        settings = config.load(argv[0] if argv else "", _overrides(argv[1:]))
        from diffusion import trainer

        gc.set_threshold(700, 10, 10)  # Python's own: a run of days cannot put garbage off as a start can (cli.enter)
        said = trainer.describe(settings) if dry_run else trainer.train(settings)
        _say(said, sys.stdout)
    except ValueError as error:
        _say("\n".join(f"train.py: {line}" for line in str(error).splitlines()), sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except (FloatingPointError, OSError) as error:
        _say(f"train.py: {error}", sys.stderr)
        return 1
    return 0


def _say(text: object, stream: TextIO) -> None:
    """Of several processes the first one speaks; what only another one knows ends the others through the launcher."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=stream)


def _overrides(words: Sequence[str]) -> list[str]:
    """``--train.lr 3e-4`` becomes ``train.lr=3e-4``."""
    joined: list[str] = []
    for word in words:
        if joined and joined[-1].startswith("--") and "=" not in joined[-1]:
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined
