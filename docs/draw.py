"""Run every drawing command of docs/generating.md again, and so make its pictures.

python docs/draw.py
"""

import os
import re
import shlex
import sys
from pathlib import Path

from PIL import Image, ImageDraw

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))


def commands(page: Path) -> list[list[str]]:
    """The words of every ``python generate.py`` line in its ``sh`` blocks."""
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("python generate.py ")]
    return [shlex.split(line)[2:] for line in lines]


def main() -> int:
    """Exit code 0, or that of the first command that failed."""
    from diffusion.cli.generate import run

    page, folder = DOCS / "generating.md", DOCS / "generating"
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    mask = Image.new("L", (128, 128), 0)
    ImageDraw.Draw(mask).rectangle((0, 0, 127, 60), fill=255)
    mask.save("mask.png")
    for words in [["mountain", "--seed", "1", "--output", "mountain.png"], *commands(page)]:
        print("generate.py", shlex.join(words), file=sys.stderr)
        code = run([*words, "--quiet"])
        if code:
            return code
    return tidy(folder, page)


def tidy(folder: Path, page: Path) -> int:
    """Keep what the page shows, in 128 colours: they are many, and small."""
    shown = set(re.findall(r"!\[\]\(generating/(.*?)\)", page.read_text(encoding="utf-8")))
    for file in sorted(folder.rglob("*.*")):
        if file.relative_to(folder).as_posix() not in shown:
            file.unlink()
        elif file.suffix == ".png":
            Image.open(file).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(file, optimize=True)
    for left in sorted(path for path in folder.iterdir() if path.is_dir()):
        left.rmdir()
    return 0


if __name__ == "__main__":
    sys.exit(main())
