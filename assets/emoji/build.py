"""Build the emoji image folder: every distinct Noto Color Emoji glyph with its English CLDR name.

    python assets/emoji/build.py                     # writes data/emoji/

The two sources are Debian packages (``apt-get install fonts-noto-color-emoji unicode-cldr-core``); other copies of
the same files are named with ``--font`` and ``--cldr``. The result is an ordinary image folder:

    data/emoji/images/1f34e.png      128x128 RGB on white
    data/emoji/metadata.jsonl        {"file_name", "text", "keywords", "base", "split"}

``text`` is the CLDR name, ``keywords`` are further captions, ``base`` is the name without its skin tones (a person in
six tones is one base), ``split`` is ``train`` or ``held_out``.
"""

import argparse
import hashlib
import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, features

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
CLDR = Path("/usr/share/unicode/cldr/common")
SKIN_TONES = tuple(f"{tone} skin tone" for tone in ("light", "medium-light", "medium", "medium-dark", "dark"))
BITMAP = 109  # the one size, in pixels per em, that the font holds: each glyph is a 136x128 bitmap
CANVAS = 144  # native canvas, before it is scaled down to the picture: leaves a margin around the widest glyph
SIZE = 128


def base_of(name: str) -> str:
    """The name without its skin tones: ``"person: light skin tone, bald"`` -> ``"person: bald"``."""
    head, colon, qualifiers = name.partition(": ")
    kept = [part for part in qualifiers.split(", ") if part not in SKIN_TONES]
    return f"{head}{colon}{', '.join(kept)}" if colon and kept else head


def is_held_out(name: str) -> bool:
    """One in ten of the names that end in ``": <skin tone>"``: a function of the name alone, it never drifts."""
    single_tone = any(name.endswith(f": {tone}") for tone in SKIN_TONES)
    return single_tone and int(hashlib.md5(name.encode()).hexdigest(), 16) % 10 == 0


def read_names(cldr: Path) -> dict[str, tuple[str, list[str]]]:
    """Map each character sequence to its (name, keywords), in the order of the CLDR files."""
    names: dict[str, str] = {}
    keywords: dict[str, list[str]] = {}
    for folder in ("annotations", "annotationsDerived"):
        for node in ElementTree.parse(cldr / folder / "en.xml").getroot().iter("annotation"):
            sequence, text = node.attrib["cp"], node.text or ""
            if node.get("type") == "tts":
                names[sequence] = text
            else:
                keywords[sequence] = [word.strip() for word in text.split("|")]
    return {sequence: (name, keywords.get(sequence, [])) for sequence, name in names.items()}


def draw_glyph(font: ImageFont.FreeTypeFont, sequence: str) -> Image.Image | None:
    """One glyph centred on white at 128x128, or None where the font has no colour picture for the sequence.

    The glyph is laid on white at its native size and only then scaled, so that no hidden colour under transparent
    pixels bleeds into an edge. All glyphs share one scale: a small one stays small.
    """
    if font.getlength(sequence) > CANVAS:  # several glyphs in a row: the font has no ligature for this sequence
        return None
    glyph = Image.new("RGBA", (CANVAS, CANVAS), (255, 255, 255, 0))
    ImageDraw.Draw(glyph).text((0, 0), sequence, font=font, embedded_color=True)
    box = glyph.getchannel("A").getbbox()
    if box is None:
        return None
    glyph = glyph.crop(box)
    picture = Image.new("RGBA", (CANVAS, CANVAS), "white")
    picture.alpha_composite(glyph, ((CANVAS - glyph.width) // 2, (CANVAS - glyph.height) // 2))
    return picture.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def build(font_path: Path, cldr: Path, out: Path) -> list[dict]:
    """Write the folder and return the rows of its ``metadata.jsonl``.

    Of several sequences with the same picture the first is kept; the names of the others become its keywords.
    """
    font = ImageFont.truetype(str(font_path), BITMAP, layout_engine=ImageFont.Layout.RAQM)
    (out / "images").mkdir(parents=True, exist_ok=True)
    rows: dict[bytes, dict] = {}
    for sequence, (name, keywords) in read_names(cldr).items():
        picture = draw_glyph(font, sequence)
        if picture is None:
            continue
        pixels = picture.tobytes()
        if pixels in rows:
            rows[pixels]["keywords"].append(name)
            continue
        file_name = f"images/{'-'.join(f'{ord(char):x}' for char in sequence)}.png"
        picture.save(out / file_name)
        rows[pixels] = {
            "file_name": file_name,
            "text": name,
            "keywords": [word for word in keywords if word != name],
            "base": base_of(name),
            "split": "held_out" if is_held_out(name) else "train",
        }
    with open(out / "metadata.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows.values())
    return list(rows.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--font", type=Path, default=FONT)
    parser.add_argument("--cldr", type=Path, default=CLDR, help="folder holding annotations/ and annotationsDerived/")
    parser.add_argument("--out", type=Path, default=Path("data/emoji"))
    args = parser.parse_args()
    for path, package in ((args.font, "fonts-noto-color-emoji"), (args.cldr, "unicode-cldr-core")):
        if not path.exists():
            print(
                f"build.py: {path} does not exist; install the Debian package {package} or name another path",
                file=sys.stderr,
            )
            return 2
    if not features.check("raqm"):
        print("build.py: this Pillow has no raqm text layout; install libraqm0 or Pillow's own wheel", file=sys.stderr)
        return 2
    rows = build(args.font, args.cldr, args.out)
    held_out = sum(row["split"] == "held_out" for row in rows)
    bases = len({row["base"] for row in rows})
    print(f"{args.out}: {len(rows)} pictures of {bases} base glyphs, {held_out} held out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
