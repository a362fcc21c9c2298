"""Losses on fixed probes: the same pictures, captions, noises and times each time, of pictures trained on and not."""

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffusion.data.dataset import BINS

PATIENCE = 3  # measurements in a row that must be worse before it is called overfitting
MARGIN = 1.01  # and worse by this factor


class Probe:
    """A few pictures of a set, evenly spaced, each at ``BINS`` noise levels; nothing of it touches training's draws."""

    def __init__(self, dataset: Any, count: int) -> None:
        self.dataset = dataset
        places = [i * len(dataset) // min(count, len(dataset)) for i in range(min(count, len(dataset)))]
        self.visits = [(place, level) for level in range(BINS) for place in places]

    @torch.no_grad()
    def measure(
        self, module: nn.Module, device: torch.device, autocast: Callable[[], AbstractContextManager], batch_size: int
    ) -> list[float]:
        """The mean loss of each bin of noise levels, from the least noise to the most."""
        losses = torch.zeros(len(self.visits))
        for places in self._batches(batch_size):
            batch = self.dataset.__getitems__([self.visits[place] for place in places])
            with autocast():
                losses[places] = module({name: tensor.to(device) for name, tensor in batch.items()}).float().cpu()
        return losses.view(BINS, -1).mean(dim=1).tolist()

    def _batches(self, batch_size: int) -> Iterator[list[int]]:
        """Places of visits, those of one shape together."""
        shapes = defaultdict(list)
        for place, (index, _) in enumerate(self.visits):
            shapes[self.dataset.shape_of(index)].append(place)
        for places in shapes.values():
            for start in range(0, len(places), batch_size):
                yield places[start : start + batch_size]


class History:
    """The measurements of a run, on disk in ``validation.jsonl``: which was the best, and whether it overfits."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.rows: list[dict[str, Any]] = []
        if file.is_file():
            lines = file.read_text(encoding="utf-8").splitlines()
            self.rows = [json.loads(line) for line in lines if line.endswith("}")]

    def forget_after(self, step: int) -> None:
        """Drop what was measured after the checkpoint: those steps are done again."""
        self.rows = [row for row in self.rows if row["step"] <= step]
        self._write()

    def add(self, step: int, losses: dict[str, dict[str, list[float]]]) -> bool:
        """Keep ``losses[probe][weights][bin]``; whether it is the best so far."""
        means = {p: {w: sum(bins) / len(bins) for w, bins in kinds.items()} for p, kinds in losses.items()}
        row: dict[str, Any] = {"step": step, **means, "bins": losses}
        best = not self.rows or _judged(row) < min(map(_judged, self.rows))
        self.rows.append(row)
        self._write()
        return best

    def verdict(self) -> str | None:
        """A plain sentence if the run has begun to overfit."""
        best = min(self.rows, key=_judged, default=None)
        if best is None or "held_out" not in best:
            return None
        worse = [row["step"] > best["step"] and _judged(row) > MARGIN * _judged(best) for row in self.rows[-PATIENCE:]]
        last = self.rows[-1]
        if len(worse) < PATIENCE or not all(worse) or last["train"]["shipped"] >= best["train"]["shipped"]:
            return None
        return (
            f"step {last['step']}: it overfits. The loss on held-out pictures was best at step {best['step']} "
            f"({_judged(best):.4f}) and is now {_judged(last):.4f}, while that on training pictures still falls; "
            "the model of the best step is in best/"
        )

    def _write(self) -> None:
        part = self.file.with_suffix(".part")
        part.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")
        os.replace(part, self.file)


def _judged(row: dict[str, Any]) -> float:
    """The loss by which a measurement is judged: of the weights that are shipped, on held-out pictures if there are."""
    return row.get("held_out", row["train"])["shipped"]


def sets(task: Any, pictures: Sequence[Any], held_out: Sequence[Any], count: int) -> dict[str, Probe]:
    """A probe of the training pictures, and one of the held-out pictures where there are any."""
    chosen = {"train": pictures, "held_out": held_out}
    return {name: Probe(task.probe(some), count) for name, some in chosen.items() if some}
