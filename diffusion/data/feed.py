"""Where the loop's batches come from: a folder of pictures, or shards read as a stream."""

import json
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from torch.utils.data import DataLoader

from diffusion.data.dataset import Batch
from diffusion.data.order import Visit, Visits, batches
from diffusion.data.source import Picture

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one of ``processes`` computes of every step, in micro-batches; ``batch_size`` is a multiple of both."""

    batch_size: int
    micro_batch: int
    process: int = 0
    processes: int = 1
    workers: int = 0

    @property
    def accumulation(self) -> int:
        """Micro-batches of one process a step."""
        return self.batch_size // (self.micro_batch * self.processes)


class Feed(Protocol):
    """An endless sequence of batches, of which step s has the same ones whoever computes them."""

    def batches(self, dataset: Any, first_step: int, steps: int, share: Share) -> Iterator[Batch]:
        """The micro-batches of one process for the steps from ``first_step`` to ``steps``.

        ValueError or OSError names a file that cannot be read.
        """

    def files(self, ids: Iterable[int]) -> list[str]:
        """The files of pictures that were in the batches of late, by their ids."""

    def state(self) -> dict[str, Any]:
        """What this process has to remember to go on: plain values."""

    def load(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on from what all processes remembered, however many they were."""

    def write_coverage(self, file: Path, position: int, states: Sequence[Mapping[str, Any]]) -> None:
        """One JSON line a picture or shard: visits before ``position``, and reasons for what was left out."""


class FolderFeed:
    """Pictures in the order of a function. The ledger is counted from it, so a resumed run counts what came before."""

    def __init__(self, order: Visits, pictures: Sequence[Picture], left_out: Mapping[str, str]) -> None:
        self.order, self.pictures, self.left_out = order, pictures, left_out
        self.visits = np.zeros(len(pictures), dtype=np.int64)
        self.position = 0

    def batches(self, dataset: Any, first_step: int, steps: int, share: Share) -> Iterator[Batch]:
        visits = batches(
            self.order, first_step, steps, share.batch_size, share.micro_batch, share.process, share.processes
        )
        loader: DataLoader[Any] = DataLoader(
            _Telling(dataset),  # type: ignore[arg-type]  # it is asked for whole batches
            batch_sampler=visits,
            collate_fn=_as_it_is,  # type: ignore[arg-type]
            num_workers=share.workers,
            worker_init_fn=_ignore_signals,
        )
        for made in loader:
            if isinstance(made, str):
                raise ValueError(made)
            yield made

    def files(self, ids: Iterable[int]) -> list[str]:
        wanted = set(ids)
        return [str(picture.file) for picture in self.pictures if picture.id in wanted]

    def state(self) -> dict[str, Any]:
        return {}  # the order is a function of the step

    def load(self, states: Sequence[Mapping[str, Any]]) -> None:
        pass

    def write_coverage(self, file: Path, position: int, states: Sequence[Mapping[str, Any]] = ()) -> None:
        for start in range(self.position, position, 1 << 16):
            seen = [index for index, _ in self.order.visits(start, min(start + (1 << 16), position))]
            self.visits += np.bincount(seen, minlength=len(self.visits))
        self.position = position
        pairs = zip(self.pictures, self.visits, strict=True)
        write_lines(
            file, [{"file": str(picture.file), "visits": int(count)} for picture, count in pairs], self.left_out
        )


@dataclass(frozen=True)
class _Telling:
    """A dataset that gives what is wrong with a file as a text: an error would leave a worker as a whole traceback."""

    dataset: Any

    def __getitems__(self, visits: Sequence[Visit]) -> Batch | str:
        try:
            return self.dataset.__getitems__(visits)
        except (ValueError, OSError) as error:
            return str(error)


def _as_it_is(made: Batch | str) -> Batch | str:
    return made


def _ignore_signals(_worker: int) -> None:
    """Ctrl-C, or SIGTERM to a group, reaches workers too; the loop has still to finish its step with what they make."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def write_lines(file: Path, rows: Sequence[Mapping[str, Any]], left_out: Mapping[str, str]) -> None:
    """Replace a ledger in one go."""
    excluded = [{"file": name, "visits": 0, "left_out": reason} for name, reason in left_out.items()]
    part = file.with_suffix(".part")
    part.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *excluded]), encoding="utf-8")
    os.replace(part, file)


def ahead(items: Iterator[T], count: int = 2) -> Iterator[T]:
    """The same items; while one is used the next ones are made, by one thread."""
    end: Any = object()
    with ThreadPoolExecutor(1) as pool:
        waiting = deque(pool.submit(next, items, end) for _ in range(count))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(pool.submit(next, items, end))
            yield item
