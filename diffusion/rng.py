"""Randomness as a function: every draw is named by what it is for, never by when it happens to be drawn.

A draw is a pure function of ``(seed, purpose, a, b, c)``. ``(seed, purpose)`` hashes to the 128-bit key of numpy's
Philox (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"); the three integers, for instance sample,
visit and step, fill the high words of its 256-bit counter. Two names never share a block, nothing is ever advanced,
so there is no state to save: the values are the same on every device, in any order, for any batch and any number of
processes. Only raw bits come from numpy; the transforms below are ours, and equal on all machines but for the last bit
of its logarithm and cosine.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Ids = int | npt.ArrayLike


def name_id(name: str) -> int:
    """A 63-bit id for a file or caption: stable when other samples are added, removed or reordered."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") >> 1


def bits(seed: int, purpose: str, *ids: Ids, size: int) -> npt.NDArray[np.uint64]:
    """Raw 64-bit words of shape ``(*broadcast shape of ids, size)``; at most three ids, each a non-negative integer."""
    key = np.frombuffer(hashlib.blake2b(f"{purpose}\0{seed}".encode(), digest_size=16).digest(), dtype="<u8")
    a, b, c = np.broadcast_arrays(*(np.asarray(i, dtype=np.uint64) for i in (*ids, 0, 0, 0)[:3]))
    counters = zip(a.ravel().tolist(), b.ravel().tolist(), c.ravel().tolist(), strict=True)
    rows = [np.random.Philox(key=key, counter=[0, *counter]).random_raw(size) for counter in counters]
    return np.stack(rows).reshape(*a.shape, size)


def uniform(seed: int, purpose: str, *ids: Ids, size: int) -> npt.NDArray[np.float64]:
    """Uniform numbers in the open interval (0, 1): 53 bits, centred in their cells so that neither end occurs."""
    cells = (bits(seed, purpose, *ids, size=size) >> np.uint64(11)).astype(np.float64)
    return np.minimum((cells + 0.5) * 2.0**-53, 1 - 2.0**-53)  # the middle of the last cell would round to 1


def normal(seed: int, purpose: str, *ids: Ids, shape: Sequence[int]) -> npt.NDArray[np.float32]:
    """Standard normal numbers of shape ``(*shape of ids, *shape)``, by Box and Muller (1958), from 32-bit halves."""
    count = int(np.prod(shape))
    words = bits(seed, purpose, *ids, size=(count + 1) // 2)
    high = ((words >> np.uint64(32)).astype(np.float64) + 0.5) * 2.0**-32
    low = ((words & np.uint64(0xFFFFFFFF)).astype(np.float64) + 0.5) * 2.0**-32
    radius = np.sqrt(-2.0 * np.log(high)).astype(np.float32)
    angle = (2.0 * np.pi * low).astype(np.float32)
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
    return pairs.reshape(*words.shape[:-1], -1)[..., :count].reshape(*words.shape[:-1], *shape)


def permutation(seed: int, purpose: str, epoch: int, size: int) -> npt.NDArray[np.int64]:
    """A shuffle of ``range(size)``."""
    return np.argsort(bits(seed, purpose, epoch, size=size), kind="stable")
