"""Honest timing: candidates take turns, and the first one twice, so that the noise of the machine shows beside them."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tqdm import tqdm

ROUNDS = 7
CONTROL = 0.03  # how far the two runs of the same thing may lie apart


@dataclass(frozen=True)
class Timing:
    """Seconds of every round."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half of what lies between the quartiles, as a share of the median."""
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / 2 / self.median


@dataclass(frozen=True)
class Contest:
    """Timings of candidates that took turns; the first one ran twice a round."""

    timings: dict[str, Timing]
    control: Timing  # the first candidate's second run

    @property
    def first(self) -> str:
        return next(iter(self.timings))

    @property
    def drift(self) -> float:
        """How far apart the medians of the same thing lie: what the machine alone makes of nothing."""
        return abs(self.control.median / self.timings[self.first].median - 1)

    @property
    def counts(self) -> bool:
        return self.drift <= CONTROL

    def ratio(self, name: str, other: str) -> float:
        """How many times as long ``name`` takes as ``other``: the median over rounds, each round by itself."""
        pairs = zip(self.timings[name].seconds, self.timings[other].seconds, strict=True)
        return statistics.median(one / two for one, two in pairs)


def contest(candidates: Mapping[str, Callable[[], object]], rounds: int = ROUNDS, title: str = "") -> Contest:
    """Time each candidate once a round, A B C A, after one round that does not count.

    A candidate that gives back a float has measured its seconds itself, without its preparations.
    """
    first = next(iter(candidates))
    order = [*candidates.items(), ("control", candidates[first])]
    found: dict[str, list[float]] = {name: [] for name, _ in order}
    for number in tqdm(range(rounds + 1), desc=title, unit="round", leave=False):
        for name, run in order:
            started = time.perf_counter()
            own = run()
            if number:
                found[name].append(own if isinstance(own, float) else time.perf_counter() - started)
    control = Timing(found.pop("control"))
    return Contest({name: Timing(seconds) for name, seconds in found.items()}, control)
