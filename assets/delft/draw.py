"""Draw the pictures of this folder: things in white lines on blue squared paper, a style that the emoji model lacks.

python assets/blueprint/draw.py
"""

import json
import math
from pathlib import Path

from PIL import Image, ImageDraw

SIDE, SCALE = 128, 4
LINE = (22, 44, 120)
PAINTS = [(70, 110, 200), (168, 196, 240), (40, 72, 164), (120, 156, 222), (206, 222, 248), (92, 132, 210)]

Point = tuple[float, float]


def arc(x: float, y: float, rx: float, ry: float, start: float = 0, end: float = 360) -> list[Point]:
    """A piece of an ellipse, angles in degrees clockwise from the right."""
    steps = [math.radians(start + (end - start) * i / 48) for i in range(49)]
    return [(x + rx * math.cos(a), y + ry * math.sin(a)) for a in steps]


def box(x0: float, y0: float, x1: float, y1: float) -> list[Point]:
    """A rectangle, closed."""
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0)]


def star(x: float, y: float, outer: float, inner: float, points: int = 5) -> list[Point]:
    """A star, closed."""
    corners = [math.pi * i / points - math.pi / 2 for i in range(2 * points + 1)]
    return [
        (x + (inner if i % 2 else outer) * math.cos(a), y + (inner if i % 2 else outer) * math.sin(a))
        for i, a in enumerate(corners)
    ]


# Lines on a sheet of 100 x 100.
THINGS: dict[str, list[list[Point]]] = {
    "house": [box(25, 48, 75, 85), [(18, 50), (50, 20), (82, 50)], box(44, 62, 56, 85), box(31, 56, 40, 65)],
    "sailboat": [
        [(15, 65), (85, 65), (72, 82), (28, 82), (15, 65)],
        [(50, 65), (50, 15)],
        [(50, 18), (78, 58), (50, 58)],
    ],
    "star": [star(50, 52, 36, 15)],
    "fish": [
        arc(46, 50, 28, 17),
        [(72, 50), (88, 36), (88, 64), (72, 50)],
        arc(32, 46, 3, 3),
        arc(40, 50, 8, 12, -60, 60),
    ],
    "tree": [box(45, 62, 55, 86), arc(50, 42, 26, 26)],
    "cup": [[(28, 32), (33, 78), (63, 78), (68, 32), (28, 32)], arc(68, 50, 14, 13, -80, 95)],
    "car": [
        [(12, 65), (12, 52), (30, 50), (40, 36), (66, 36), (76, 50), (88, 54), (88, 65), (12, 65)],
        arc(30, 67, 9, 9),
        arc(70, 67, 9, 9),
        [(53, 36), (53, 50), (30, 50)],
    ],
    "key": [arc(32, 50, 15, 15), arc(32, 50, 6, 6), [(47, 50), (86, 50)], [(74, 50), (74, 62)], [(82, 50), (82, 60)]],
    "umbrella": [arc(50, 50, 36, 32, 180, 360), [(14, 50), (86, 50)], [(50, 50), (50, 80)], arc(44, 80, 6, 6, 0, 180)],
    "heart": [
        [
            (
                50 + 2.1 * 16 * math.sin(t / 24 * math.pi) ** 3,
                48
                - 2.1
                * (
                    13 * math.cos(t / 24 * math.pi)
                    - 5 * math.cos(t / 12 * math.pi)
                    - 2 * math.cos(t / 8 * math.pi)
                    - math.cos(t / 6 * math.pi)
                ),
            )
            for t in range(49)
        ]
    ],
    "lamp": [[(38, 20), (62, 20), (76, 50), (24, 50), (38, 20)], [(50, 50), (50, 80)], box(36, 80, 64, 86)],
    "book": [
        [(50, 30), (20, 24), (20, 74), (50, 80), (80, 74), (80, 24), (50, 30), (50, 80)],
        [(28, 38), (42, 41)],
        [(28, 48), (42, 51)],
        [(58, 41), (72, 38)],
        [(58, 51), (72, 48)],
    ],
    "clock": [arc(50, 50, 34, 34), [(50, 50), (50, 26)], [(50, 50), (66, 58)], arc(50, 50, 2, 2)],
    "bottle": [
        [(43, 14), (57, 14), (57, 34), (66, 46), (66, 86), (34, 86), (34, 46), (43, 34), (43, 14)],
        box(34, 56, 66, 74),
    ],
    "flower": [
        *(arc(50 + 17 * math.cos(a), 38 + 17 * math.sin(a), 10, 10) for a in (i * math.pi / 3 for i in range(6))),
        arc(50, 38, 8, 8),
        [(50, 65), (50, 90)],
        arc(60, 76, 10, 5),
    ],
    "sun": [
        arc(50, 50, 18, 18),
        *(
            [(50 + 24 * math.cos(a), 50 + 24 * math.sin(a)), (50 + 37 * math.cos(a), 50 + 37 * math.sin(a))]
            for a in (i * math.pi / 6 for i in range(12))
        ),
    ],
    "mountain": [[(8, 80), (38, 24), (56, 56), (66, 40), (92, 80), (8, 80)], [(30, 39), (38, 46), (46, 38)]],
    "ladder": [[(36, 12), (36, 88)], [(64, 12), (64, 88)], *([(36, y), (64, y)] for y in range(22, 86, 12))],
    "bell": [
        [(30, 70), (34, 44), (42, 30), (58, 30), (66, 44), (70, 70), (30, 70)],
        arc(50, 76, 7, 6, 0, 180),
        arc(50, 26, 4, 4),
    ],
    "kite": [
        [(50, 10), (76, 38), (50, 74), (24, 38), (50, 10)],
        [(50, 10), (50, 74)],
        [(24, 38), (76, 38)],
        [(50, 74), (56, 82), (48, 88), (56, 94)],
    ],
    "envelope": [box(16, 30, 84, 74), [(16, 30), (50, 56), (84, 30)]],
    "rocket": [
        [(50, 8), (64, 34), (64, 70), (36, 70), (36, 34), (50, 8)],
        arc(50, 42, 7, 7),
        [(36, 54), (22, 76), (36, 70)],
        [(64, 54), (78, 76), (64, 70)],
        [(44, 76), (50, 92), (56, 76)],
    ],
}


def tile(number: int, lines: list[list[Point]]) -> Image.Image:
    """One picture, drawn large and made smaller, so that its edges are clean."""
    side = SIDE * SCALE
    picture = Image.new("RGB", (side, side), "white")
    pen = ImageDraw.Draw(picture)
    for n, line in enumerate(lines):
        points = [(x / 100 * side, y / 100 * side) for x, y in line]
        if math.dist(line[0], line[-1]) < 1:
            pen.polygon(points, PAINTS[(number + n) % len(PAINTS)])
        pen.line(points, LINE, 3 * SCALE, joint="curve")
    return picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def main() -> None:
    """Write the pictures and their captions beside this file."""
    folder = Path(__file__).parent
    for number, (name, lines) in enumerate(THINGS.items()):
        tile(number, lines).save(folder / f"{name}.png", optimize=True)
    rows = [json.dumps({"file_name": f"{name}.png", "text": name}) for name in THINGS]
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
