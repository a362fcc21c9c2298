"""A ledger of what a run has seen: visits of every picture, and why the others were left out."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from diffusion.data.order import Visits
from diffusion.data.source import Picture


class Ledger:
    """Counts visits from the order itself, which is a function: a resumed run counts what was seen before it, too."""

    def __init__(self, order: Visits, pictures: Sequence[Picture], left_out: Mapping[str, str]) -> None:
        self.order, self.pictures, self.left_out = order, pictures, left_out
        self.visits = np.zeros(len(pictures), dtype=np.int64)
        self.position = 0

    def write(self, file: Path, position: int) -> None:
        """One JSON line a picture: its visits before ``position`` of the order, or the reason why it has none."""
        for start in range(self.position, position, 1 << 16):
            seen = [index for index, _ in self.order.visits(start, min(start + (1 << 16), position))]
            self.visits += np.bincount(seen, minlength=len(self.visits))
        self.position = position
        rows: list[dict[str, object]] = [
            {"file": str(picture.file), "visits": int(count)}
            for picture, count in zip(self.pictures, self.visits, strict=True)
        ]
        rows += [{"file": name, "visits": 0, "left_out": reason} for name, reason in self.left_out.items()]
        part = file.with_suffix(".part")
        part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        os.replace(part, file)
