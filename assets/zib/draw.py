"""Draw the pictures of this folder: Zib, a green creature with one eye that no emoji shows, in many poses.

python assets/zib/draw.py
"""

import json
from pathlib import Path

from PIL import Image, ImageDraw

SIDE, SCALE = 128, 4
BODY, EDGE, BELLY = (126, 200, 60), (70, 130, 30), (250, 220, 90)


def zib(look: float, tilt: float, size: float, arms: float) -> Image.Image:
    """One picture: where the eye looks (-1 to 1), how far it leans (degrees), how large it is, where its arms are."""
    side = SIDE * SCALE
    picture = Image.new("RGB", (side, side), "white")
    pen = ImageDraw.Draw(picture)

    def at(x: float, y: float) -> tuple[float, float]:
        return side / 2 + size * x / 100 * side, side / 2 + size * y / 100 * side

    def round_(x: float, y: float, rx: float, ry: float, fill: object, edge: object = EDGE, width: int = 2) -> None:
        pen.ellipse([*at(x - rx, y - ry), *at(x + rx, y + ry)], fill=fill, outline=edge, width=width * SCALE)

    for foot in (-12, 12):
        round_(foot, 38, 9, 5, (240, 130, 40))
    for hand in (-1, 1):
        pen.line([at(hand * 24, 6), at(hand * 38, 6 + arms)], EDGE, 6 * SCALE)
        round_(hand * 38, 6 + arms, 5, 5, BODY)
    pen.line([at(0, -28), at(0, -42)], EDGE, 3 * SCALE)
    round_(0, -43, 5, 5, (230, 50, 60))
    round_(0, 4, 28, 34, BODY)
    round_(0, 18, 16, 15, BELLY, BELLY)
    round_(0, -10, 14, 14, "white")
    round_(5 * look, -10, 6, 6, (40, 30, 60), (40, 30, 60))
    pen.arc([*at(-9, 2), *at(9, 16)], 20, 160, fill=EDGE, width=2 * SCALE)
    return picture.rotate(tilt, Image.Resampling.BICUBIC, fillcolor="white").resize(
        (SIDE, SIDE), Image.Resampling.LANCZOS
    )


def main() -> None:
    """Write the pictures and their captions beside this file."""
    folder = Path(__file__).parent
    rows = []
    for n in range(16):
        picture = zib(look=(n % 5 - 2) / 2, tilt=(n % 4 - 1.5) * 8, size=0.8 + 0.08 * (n % 4), arms=(n % 3 - 1) * 14)
        picture.save(folder / f"{n:02d}.png", optimize=True)
        rows.append(json.dumps({"file_name": f"{n:02d}.png", "text": "zib"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
