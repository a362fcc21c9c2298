"""Run every drawing command of docs/generating.md and every program of docs/python.md, and so make their pictures.

python docs/draw.py
"""

import os
import re
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))


def blocks(page: Path, language: str) -> list[str]:
    """What stands in the blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """The words of every ``python generate.py`` line in its ``sh`` blocks."""
    lines = [line for block in blocks(page, "sh") for line in block.splitlines()]
    return [shlex.split(line)[2:] for line in lines if line.startswith("python generate.py ")]


def main() -> int:
    """Exit code 0, or that of the first command that failed."""
    from diffusion.cli.generate import run

    pages = DOCS / "generating.md", DOCS / "python.md"
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        Path("assets").symlink_to(DOCS.parent / "assets")
        mask = Image.new("L", (128, 128), 0)
        ImageDraw.Draw(mask).rectangle((0, 0, 127, 60), fill=255)
        mask.save("mask.png")
        for words in [["mountain", "--seed", "1", "--output", "mountain.png"], *commands(pages[0])]:
            print("generate.py", shlex.join(words), file=sys.stderr)
            code = run([*words, "--quiet"])
            if code:
                return code
        for program in blocks(pages[1], "python"):
            exec(program, {})
        keep({name for page in pages for name in re.findall(r"!\[\]\(generating/(.*?)\)", page.read_text("utf-8"))})
        os.chdir(DOCS)
    return 0


def keep(shown: set[str]) -> None:
    """Take what the pages show, in 128 colours: they are many, and small."""
    folder = DOCS / "generating"
    folder.mkdir(exist_ok=True)
    for left in {file.name for file in folder.iterdir()} - shown:
        (folder / left).unlink()
    for name in shown:
        if name.endswith(".png"):
            image = Image.open(name).convert("RGB").quantize(128, dither=Image.Dither.NONE)
            image.save(folder / name, optimize=True)
        else:
            shutil.copyfile(name, folder / name)


if __name__ == "__main__":
    sys.exit(main())
