"""A U-Net through ``torch.compile``, believed only where it proves equal to itself uncompiled."""

import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion.models.packing import unpack

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.02}  # of the norm of what it puts out
CACHE = Path.home() / ".cache" / "diffusion" / "compiled"


class Compiled:
    """Called like the U-Net. Each new shape is compiled when it comes, compared with the eager one, and timed.

    Weights become constants (freezing), so they must not change afterwards. ``report`` says what was found.
    """

    def __init__(self, unet: Any) -> None:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(CACHE))  # a second start finds what the first one made
        unpack(unet)  # freezing packs weights by itself, and cannot see into ours
        self.unet, self.parameters, self.dtype = unet, unet.parameters, unet.dtype
        self.fast = torch.compile(unet, dynamic=False)
        self.trusted: dict[tuple[Any, ...], bool] = {}
        self.report = ""

    def __call__(self, x: Tensor, t: Tensor, **condition: Any) -> Any:
        shape = (tuple(x.shape), tuple(condition["encoder_hidden_states"].shape))
        if shape not in self.trusted:
            return self._prove(shape, x, t, condition)
        with torch.no_grad():
            return (self.fast if self.trusted[shape] else self.unet)(x, t, **condition)

    def _prove(self, shape: tuple[Any, ...], x: Tensor, t: Tensor, condition: dict[str, Any]) -> Any:
        """Compile for a shape; what it puts out is used from now on if it is what the network puts out."""
        import torch._inductor.config as inductor

        plain, eager = _timed(self.unet, x, t, condition)
        started = time.perf_counter()
        try:
            with inductor.patch(freezing=True), torch.no_grad():
                found = self.fast(x, t, **condition)
        except Exception as failure:  # no C++ compiler, an operator that it does not know: drawing can do without
            return self._settle(shape, False, f"failed ({str(failure).strip().splitlines()[0]})", plain)
        took = time.perf_counter() - started
        error = float((found[0].float() - plain[0].float()).norm() / plain[0].float().norm())
        if not error <= TOLERANCE[self.dtype]:
            return self._settle(shape, False, f"is off by {error:.1g} of the norm", plain)
        _, fast = _timed(self.fast, x, t, condition)
        gain = eager - fast
        pays = f"pays after {took / gain:,.0f} evaluations" if gain > 0 else "does not pay here"
        said = f"{took:.0f} s to compile, {eager * 1e3:.0f} -> {fast * 1e3:.0f} ms an evaluation: {pays}"
        return self._settle(shape, True, said, found)

    def _settle(self, shape: tuple[Any, ...], trusted: bool, said: str, found: Any) -> Any:
        self.trusted[shape] = trusted
        self.report = said if trusted else f"{said}: it is not used"
        return found


def _timed(network: Any, x: Tensor, t: Tensor, condition: dict[str, Any]) -> tuple[Any, float]:
    """What it puts out, and the seconds that takes when it is warm."""
    with torch.no_grad():
        network(x, t, **condition)
        started = time.perf_counter()
        found = network(x, t, **condition)
        if x.device.type == "cuda":
            torch.cuda.synchronize()
    return found, time.perf_counter() - started
