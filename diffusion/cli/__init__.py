"""The ``diffusion`` command: finds the subcommand, and imports only that one."""

import gc
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import NoReturn

from diffusion.names import did_you_mean
from diffusion.notices import reason

COMMANDS = {
    "generate": "make pictures from text",
    "ui": "draw on a page in the browser",
    "train": "train a model from a config",
    "evaluate": "measure a model",
    "tune": "find how few steps a model needs",
    "export": "write a model as a folder or one file, with LoRAs merged in; rewrite a LoRA",
    "info": "describe this installation, a model folder or a picture",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``diffusion COMMAND ...`` and return its exit code."""
    command, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in COMMANDS:
        try:
            code = import_module(f"diffusion.cli.{command}").run(rest)
            sys.stdout.flush()  # here, and not while Python ends
            return int(code)
        except BrokenPipeError:
            return left_alone()
    if command in ("-h", "--help"):
        print(_help())
        return 0
    if command == "--version":
        from diffusion import __version__

        print(f"diffusion {__version__}")
        return 0
    known = ", ".join(COMMANDS)
    print(
        f"diffusion: unknown command {command!r}{did_you_mean(command, COMMANDS)} (commands: {known})", file=sys.stderr
    )
    return 2


def left_alone() -> int:
    """The exit code where the reader of our stdout has left; Python would complain once more when it flushes."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def enter(run: Callable[[], int] = main) -> NoReturn:
    """A whole process: run a command, and leave with its exit code.

    Importing the libraries makes millions of objects that live to the end. To look through them for garbage, again and
    again and once more at the exit, is a quarter of the time of a first picture.
    """
    gc.set_threshold(1_000_000)
    try:
        code = run()
    except ModuleNotFoundError as error:  # of a copy that is not installed
        prog = os.path.basename(sys.argv[0]).replace("__main__.py", "diffusion")
        print(f"{prog}: {reason(error)}", file=sys.stderr)
        code = 1
    gc.freeze()
    sys.exit(code)


def _help() -> str:
    rows = "\n".join(f"  {name:<10} {purpose}" for name, purpose in COMMANDS.items())
    return f"usage: diffusion COMMAND ...\n\n{rows}\n\n`diffusion COMMAND --help` tells more."
