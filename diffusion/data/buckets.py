"""Pictures of different shapes in one run: a few shapes of about one area, and batches that hold one shape each."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from diffusion import rng
from diffusion.data.order import Order, Visit

Shape = tuple[int, int]  # width and height in pixels


def shapes(size: int, step: int, max_ratio: float = 2.0) -> list[Shape]:
    """Shapes of at most ``size * size`` pixels, both sides multiples of ``step``, none longer than ``max_ratio``.

    For each width the greatest height, and the other way round: size 512 and step 64 give 512x512, 448x576, 576x448 ...
    A step that is large for the size leaves few shapes, unless ``max_ratio`` is raised. ValueError if ``size`` is no
    multiple of ``step``.
    """
    if size % step:
        raise ValueError(f"data.size {size} is not a multiple of {step} pixels, the step of its buckets")
    found = set()
    for width in range(step, int(size * math.sqrt(max_ratio)) + 1, step):
        height = size * size // width // step * step
        if height and max(width, height) <= max_ratio * min(width, height):
            found |= {(width, height), (height, width)}
    return sorted(found)


def nearest(sides: Shape, among: Sequence[Shape]) -> Shape:
    """The shape whose aspect ratio is nearest; of equally near ones the largest."""
    ratio = math.log(sides[0] / sides[1])
    return min(among, key=lambda shape: (round(abs(math.log(shape[0] / shape[1]) - ratio), 9), -shape[0] * shape[1]))


class BucketOrder:
    """An endless sequence of visits: every batch holds one shape, and every picture comes as often as it should.

    Buckets take turns by the weight of their pictures; each has an order of its own that goes on where its last turn
    ended. What is left over at the end of a bucket's epoch is thus filled up from its next one: nothing is dropped or
    counted twice. As whole steps hold one shape, it does not matter how a batch is split.
    """

    def __init__(self, seed: int, weights: npt.NDArray[np.float64], shape_of: Sequence[Shape], batch_size: int) -> None:
        kinds = sorted(set(shape_of))
        self.batch_size = batch_size
        self.members = [np.array([i for i, shape in enumerate(shape_of) if shape == kind]) for kind in kinds]
        self.orders = [
            Order(rng.name_id(f"{seed} {kind}"), weights[own] / weights[own].sum())
            for kind, own in zip(kinds, self.members, strict=True)
        ]
        self.seed = seed
        self.shares = np.array([weights[own].sum() for own in self.members])
        self._turns: list[tuple[int, int]] = []  # (bucket, which of its turns) of each step so far
        self._taken = np.zeros(len(kinds), dtype=np.int64)

    def visits(self, start: int, stop: int) -> list[Visit]:
        """The visits at positions start .. stop-1 of the sequence; step s is at ``s * batch_size`` and after."""
        found: list[Visit] = []
        while start < stop:
            step, offset = divmod(start, self.batch_size)
            end = min(stop, (step + 1) * self.batch_size)
            bucket, turn = self._turn(step)
            first = turn * self.batch_size + offset
            own = self.members[bucket]
            found += [(int(own[i]), visit) for i, visit in self.orders[bucket].visits(first, first + end - start)]
            start = end
        return found

    def _turn(self, step: int) -> tuple[int, int]:
        """The bucket that has fallen behind its share most, with a little chance: none is ever far off."""
        while step >= len(self._turns):
            done = len(self._turns)
            chance = rng.uniform(self.seed, "bucket", done, size=len(self.shares))
            bucket = int(np.argmax(self.shares * (done + 1) - self._taken + chance))
            self._turns.append((bucket, int(self._taken[bucket])))
            self._taken[bucket] += 1
        return self._turns[step]
