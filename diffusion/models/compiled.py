"""A network through ``torch.compile``, believed only where it proves equal to itself uncompiled."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion.models.packing import unpack

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.02}  # of the norm of what it puts out
CACHE = Path.home() / ".cache" / "diffusion" / "compiled"


class Compiled:
    """The forward of a network from now on. Each new shape is compiled when it comes, compared with eager, and timed.

    Weights become constants (freezing), so they must not change afterwards. ``report`` says what was found.
    """

    def __init__(self, network: nn.Module) -> None:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(CACHE))  # a second start finds what the first one made
        unpack(network)  # freezing packs weights by itself, and cannot see into ours
        self.plain = network.forward
        self.fast: Callable[..., Any] = torch.compile(self.plain, dynamic=False)
        self.trusted: dict[tuple[Any, ...], bool] = {}
        self.report = "was not used"
        network.forward = self

    def __call__(self, *values: Any, **named: Any) -> Any:
        given = (*values, *named.values())
        shape = tuple((tuple(value.shape), value.dtype) for value in given if isinstance(value, Tensor))
        if shape not in self.trusted:
            return self._prove(shape, *values, **named)
        with torch.no_grad():
            return (self.fast if self.trusted[shape] else self.plain)(*values, **named)

    def _prove(self, shape: tuple[Any, ...], *values: Any, **named: Any) -> Any:
        """Compile for a shape; what it puts out is used from now on if it is what the network puts out."""
        import torch._inductor.config as inductor

        plain, eager = _timed(self.plain, *values, **named)
        started = time.perf_counter()
        try:
            with inductor.patch(freezing=True), torch.no_grad():
                found = self.fast(*values, **named)
        except Exception as failure:  # no C++ compiler, an operator that it does not know: drawing can do without
            return self._settle(shape, False, f"failed ({str(failure).strip().splitlines()[0]})", plain)
        took = time.perf_counter() - started
        expected = _output(plain)
        error = float((_output(found).float() - expected.float()).norm() / expected.float().norm())
        if not error <= TOLERANCE[expected.dtype]:
            return self._settle(shape, False, f"is off by {error:.1g} of the norm", plain)
        _, fast = _timed(self.fast, *values, **named)
        gain = eager - fast
        pays = f"pays after {took / gain:,.0f} evaluations" if gain > 0 else "does not pay here"
        said = f"{took:.0f} s to compile, {eager * 1e3:.0f} -> {fast * 1e3:.0f} ms an evaluation: {pays}"
        return self._settle(shape, True, said, found)

    def _settle(self, shape: tuple[Any, ...], trusted: bool, said: str, found: Any) -> Any:
        self.trusted[shape] = trusted
        self.report = said if trusted else f"{said}: it is not used"
        return found


def _output(found: Any) -> Tensor:
    """Networks put out a tensor, or a tuple that begins with one."""
    return found if isinstance(found, Tensor) else found[0]


def _timed(network: Callable[..., Any], *values: Any, **named: Any) -> tuple[Any, float]:
    """What it puts out, and the seconds that takes when it is warm."""
    with torch.no_grad():
        network(*values, **named)
        started = time.perf_counter()
        found = network(*values, **named)
        if _output(found).device.type == "cuda":
            torch.cuda.synchronize()
    return found, time.perf_counter() - started
