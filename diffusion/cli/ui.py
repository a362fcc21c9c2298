"""``diffusion ui``: a page in the browser to draw with, for this machine alone unless --host says otherwise."""

import os
import socket
import sys
import tempfile
from argparse import SUPPRESS, Namespace
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from diffusion import names
from diffusion.cli.flags import Parser, whole
from diffusion.cli.request import check_loras, find_model, quiet_libraries
from diffusion.cli.voice import unmet
from diffusion.images import DEFAULT_FOLDER, check_output, parse_output
from diffusion.notices import reason

ASIDE = {  # read when gradio and what it stands on are imported: it asks no network for anything
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_RUN_HISTORY": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}

PATIENCE = 5  # seconds that the last step has before it is left


def run(argv: Sequence[str]) -> int:
    """Serve the page until Ctrl-C: exit code 130 then, 2 for a request that cannot be met, 1 for a failure."""
    parser = _parser()
    try:
        args = parser.read(argv, words="words")
        if args.help:
            parser.print_help()
            return 0
        args.loras = _check(args)
        args.port = _free_port(args.host, args.port)
        serve(args)
        return 0
    except KeyboardInterrupt:
        return 130
    except (PermissionError, ValueError) as error:
        print(f"diffusion ui: {unmet(error)}", file=sys.stderr)
        return 2
    except Exception as error:  # whatever it was, a person gets one line
        print(f"diffusion ui: {reason(error)}", file=sys.stderr)
        return 1


def serve(args: Namespace) -> None:
    """Load the model, and show the page for as long as nobody interrupts."""
    quiet_libraries()
    os.environ.update(ASIDE)
    from diffusion.pipeline import TextToImage
    from diffusion.studio import Studio

    model = TextToImage.load(args.model, args.device, args.dtype, args.loras)
    studio = Studio(model=model, name=args.model, loras=args.loras, device=args.device, output=args.output)
    try:
        with tempfile.TemporaryDirectory(prefix="diffusion-ui-") as cache:
            os.environ["GRADIO_TEMP_DIR"] = cache  # what the page shows is copied there, and goes when it does
            from diffusion import page

            page.show(studio, args.host, args.port, browser=args.open)
    finally:
        if not studio.close(PATIENCE):  # in the middle of a step, which nothing interrupts; it has written nothing yet
            os._exit(130)


def _parser() -> Parser:
    parser = Parser(prog="diffusion ui", usage="%(prog)s [flags]", description=__doc__)
    add = parser.add_argument
    add("words", nargs="*", help=SUPPRESS)
    add("-m", "--model", default="emoji", help="folder, .safetensors file, Hub id or shipped model (%(default)s)")
    add("-l", "--lora", action="append", default=[], metavar="PATH[:W]", help="LoRA or learnt word; repeatable")
    add("-o", "--output", type=Path, default=Path(DEFAULT_FOLDER), metavar="DIR", help="the pictures (%(default)s)")
    add("--port", type=whole, default=7860, help="where the page is (%(default)s); 0: any that is free")
    add("--host", default="127.0.0.1", help="0.0.0.0 lets everybody in who reaches this machine (%(default)s)")
    add("--open", action="store_true", help="open the page in the browser")
    add("--device", help="auto, cpu, cuda, cuda:1, mps, xpu (default: auto)")
    add("--dtype", help="fp32, bf16 or fp16 (default: what the machine is fast at; small models fp32)")
    return parser


def _check(args: Namespace) -> dict[str, float]:
    """What is put on the model, once nothing can be wrong any more that is known without a library."""
    if args.words:
        raise ValueError(f"prompts are typed into the page: leave out {args.words[0]!r}")
    names.check_device(args.device)
    names.resolve_dtype(args.dtype, args.device)
    loras = check_loras(args.lora)
    find_model(args.model, offline=False)
    if args.output.exists() and not args.output.is_dir():
        raise ValueError(f"--output {args.output} is a file: name a folder")
    check_output(parse_output(f"{args.output}/"), 1, 0, "", "--output")
    if find_spec("gradio") is None:
        raise ValueError("the page needs gradio: pip install -e '.[ui]'")
    return loras


def _free_port(host: str, port: int) -> int:
    """The port, or of 0 one that is free. ValueError for one that cannot be listened at."""
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            return int(probe.getsockname()[1])
    except (OSError, OverflowError) as error:
        why = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        raise ValueError(f"cannot listen at {host} port {port} ({why}): give another --host or --port") from None
