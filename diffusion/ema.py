"""Exponential moving average of weights, in a few fused calls."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """Averaged copies of a module's parameters.

    The decay warms up as ``(1 + step) / (10 + step)`` until it reaches its ceiling (the ``num_updates`` of TensorFlow's
    ``ExponentialMovingAverage``; diffusers' ``EMAModel`` is one step behind), so that it is of the last tenth of
    the steps: short runs are averaged too, and do not lag behind their own weights.
    """

    def __init__(self, module: nn.Module, decay: float, every: int = 1) -> None:
        self.decay, self.every = decay, every
        kept = module.named_parameters() if decay > 0 else ()
        self.weights: dict[str, Tensor] = {n: p.detach().clone() for n, p in kept if p.requires_grad}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Move towards the module's weights; ``step`` counts the optimizer steps done, from 1.

        Of ``every`` calls one does so, by as much as all of them would have.
        """
        if step % self.every:
            return
        decay = min(self.decay, (1 + step) / (10 + step)) ** self.every
        live: list[Tensor] = [p for p in module.parameters() if p.requires_grad]
        torch._foreach_lerp_(list(self.weights.values()), live, 1 - decay)

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Within the block the module holds the averaged weights; afterwards its own, whatever happened."""
        live = {n: p for n, p in module.named_parameters() if n in self.weights}
        own = {name: parameter.detach().clone() for name, parameter in live.items()}
        try:
            _copy(self.weights, live)
            yield
        finally:
            _copy(own, live)


@torch.no_grad()
def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    for name, tensor in target.items():
        tensor.copy_(source[name])
