"""Networks that wait in the machine's memory, and are on the device only while they are at work."""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

AUTOENCODER = ("encoder", "post_quant_conv", "decoder")  # what is called of one, from outside


class Offload:
    """One network on the device at a time: it comes when it is called, and the one before it goes.

    Whatever it is given is brought to the device too; what it puts out stays there.
    """

    def __init__(self, networks: Iterable[nn.Module], device: torch.device) -> None:
        self.networks, self.device = list(networks), device
        self.present: nn.Module | None = None
        self._hooks = [
            part.register_forward_pre_hook(partial(self._call, network), with_kwargs=True)
            for network in self.networks
            for part in _entrances(network)
        ]
        for network in self.networks:
            _move(network, "cpu")

    def end(self) -> None:
        """All of them on the device again."""
        for hook in self._hooks:
            hook.remove()
        for network in self.networks:
            _move(network, self.device)

    def _call(self, network: nn.Module, part: nn.Module, given: Any, named: Any) -> Any:
        if self.present is not network:
            if self.present is not None:
                _move(self.present, "cpu")
            _move(network, self.device)
            self.present = network
        return tree_map(self._here, (given, named))

    def _here(self, value: Any) -> Any:
        return value.to(self.device) if isinstance(value, Tensor) else value


def _move(network: nn.Module, device: torch.device | str) -> None:
    """Outside of inference mode: weights that are made in it can never be trained, nor put in another precision."""
    with torch.inference_mode(False):
        network.to(device)


def _entrances(network: nn.Module) -> Iterator[nn.Module]:
    """What is called when a network is: itself, or the parts of an autoencoder, which has no forward of its own."""
    parts = [part for name in AUTOENCODER if (part := getattr(network, name, None)) is not None]
    yield from parts if len(parts) > 1 else [network]
