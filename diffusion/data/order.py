"""Which picture comes when: the sample order as a function of (seed, position), for any number of processes."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt

from diffusion import rng

Visit = tuple[int, int]  # (index of the picture, number of this visit to it)
Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Order:
    """An endless sequence of visits in epochs of ``len(weights)``; equal weights visit each picture once an epoch.

    With weights, systematic resampling visits picture i either floor or ceil of ``n * weight_i`` times an epoch.
    """

    seed: int
    weights: npt.NDArray[np.float64]

    def visits(self, start: int, stop: int) -> list[Visit]:
        """The visits at positions start .. stop-1 of the sequence."""
        found: list[Visit] = []
        while start < stop:
            epoch, first = divmod(start, len(self.weights))
            pictures, numbers = (side[first : first + stop - start].tolist() for side in self._epoch(epoch))
            found += zip(pictures, numbers, strict=True)
            start += len(pictures)
        return found

    @lru_cache(maxsize=2)  # noqa: B019 - an order lives as long as its run
    def _epoch(self, epoch: int) -> tuple[Numbers, Numbers]:
        """Pictures and numbers of the visits, as arrays: a million pictures are sixteen megabytes and no objects."""
        size = len(self.weights)
        shift = rng.uniform(self.seed, "order.shift", epoch, size=1)[0]
        edges = np.floor(np.cumsum(self.weights) * size + shift + 1e-9).astype(np.int64)
        edges[-1] = size + int(np.floor(shift))
        counts = np.diff(edges, prepend=int(np.floor(shift)))
        index = np.repeat(np.arange(size), counts)
        repeat = np.arange(size) - np.repeat(np.cumsum(counts) - counts, counts)
        most = int(np.ceil(size * self.weights.max())) + 1
        shuffle = rng.permutation(self.seed, "order", epoch, size)
        return index[shuffle], epoch * most + repeat[shuffle]


class Visits(Protocol):
    """Anything that knows which visit is at which position."""

    def visits(self, start: int, stop: int) -> list[Visit]:
        """The visits at positions start .. stop-1."""


def batches(
    order: Visits, first_step: int, steps: int, batch_size: int, micro_batch: int, process: int = 0, processes: int = 1
) -> Iterator[list[Visit]]:
    """The micro-batches of one process, in the order they are used.

    Step s is made of positions ``s * batch_size ...`` whoever computes them; they are dealt out micro-batch by
    micro-batch, first over processes, then over accumulation. ``batch_size`` is a multiple of the other two.
    """
    for step in range(first_step, steps):
        for start in range(step * batch_size + process * micro_batch, (step + 1) * batch_size, micro_batch * processes):
            yield order.visits(start, start + micro_batch)
