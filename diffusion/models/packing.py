"""Weights in the layout that the CPU's kernels compute in, packed once; and sums that do not know their batch.

oneDNN reads convolution and matrix weights in blocks. PyTorch reorders them from its own layout at each call, which at
small batches is a quarter of a U-Net's time; ``torch.compile`` with freezing avoids that, and so does this, without
compiling. It costs the memory of a second copy of the weights.

Some kernels round otherwise when a picture is alone: a matrix with a single row, and a group norm that several threads
share. Here they do not, so that a picture of a batch is the same bytes when it is drawn again by itself.
"""

from typing import Any

import psutil
import torch
from torch import Tensor, nn

SHARED = 1024  # cells from which on threads share the group norm of a picture, and not only those of a batch


def pack(network: nn.Module) -> bool:
    """Let every convolution and linear layer of a network on the CPU pack its weights when it is first used.

    Layers fall back to their own forward where gradients are wanted, under autocast, and where their weights are on
    another device; weights that change are packed again. Returns False where there are no such kernels, or memory is
    short: weights stay as they are then, and a picture may know its batch by a rounding.
    """
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    layers: list[Any] = [layer for layer in network.modules() if type(layer) in (nn.Conv2d, nn.Linear)]
    norms: list[Any] = [layer for layer in network.modules() if type(layer) is nn.GroupNorm]
    for norm in norms:
        norm.forward = _Apart(norm)
    if 2 * sum(layer.weight.nbytes for layer in layers) > psutil.virtual_memory().available:
        return False
    for layer in layers:
        layer.forward = _Packed(layer)
    return True


def unpack(network: nn.Module) -> None:
    """Undo ``pack``."""
    for layer in network.modules():
        if isinstance(layer.__dict__.get("forward"), _Packed | _Apart):
            del layer.forward


def forget(network: nn.Module, weights: set[int]) -> None:
    """Pack the weights of these ids anew: tensors made in inference mode do not tell that they have changed."""
    for layer in network.modules():
        packed = layer.__dict__.get("forward")
        if isinstance(packed, _Packed) and id(packed.layer.weight) in weights:
            packed.made_of = None


class _Apart:
    """The forward of a group norm: one picture after the other, each shared by all threads in the same way."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        self.norm = norm

    def __call__(self, x: Tensor) -> Tensor:
        if len(x) == 1 or x[0, 0].numel() < SHARED or x.device.type != "cpu" or torch.is_grad_enabled():
            return nn.GroupNorm.forward(self.norm, x)
        return torch.cat([nn.GroupNorm.forward(self.norm, one) for one in x.split(1)])


class _Packed:
    """The forward of one layer."""

    def __init__(self, layer: Any) -> None:
        self.layer, self.plain = layer, type(layer).forward
        self.convolves = isinstance(layer, nn.Conv2d)
        self.made_of: tuple[Any, ...] | None = None  # address, version and precision of the weight that is packed
        self.weight: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        layer = self.layer
        weight = layer.weight
        if torch.is_grad_enabled() or x.dtype != weight.dtype or x.device.type != "cpu" or self._is_special(x):
            return self.plain(layer, x)
        made_of = (weight.data_ptr(), 0 if weight.is_inference() else weight._version, weight.dtype)
        if self.made_of != made_of:
            self.weight, self.made_of = self._pack(weight.detach(), x), made_of
        if not self.convolves:
            return self._multiply(x)
        shape = (list(layer.padding), list(layer.stride), list(layer.dilation), layer.groups)
        return torch.ops.mkldnn._convolution_pointwise(x, self.weight, layer.bias, *shape, "none", [], "")

    def _multiply(self, x: Tensor) -> Tensor:
        """A matrix and a vector have a kernel of their own, which rounds otherwise than that of many rows: so give two.

        Without that a picture would know whether it is drawn alone.
        """
        rows = x if x.numel() > x.shape[-1] else torch.cat([x, x])
        return torch.ops.mkldnn._linear_pointwise(rows, self.weight, self.layer.bias, "none", [], "")[: len(x)]

    def _is_special(self, x: Tensor) -> bool:
        """Whether there is no kernel: not for float16, one vector, or padding that has a name."""
        return x.dtype == torch.float16 or x.dim() == 1 or isinstance(getattr(self.layer, "padding", 0), str)

    def _pack(self, weight: Tensor, x: Tensor) -> Tensor:
        """For a batch of one, whatever comes first: sums must not depend on what was drawn before."""
        if not self.convolves:
            return torch.ops.mkldnn._reorder_linear_weight(weight, x[0].numel() // x.shape[-1])
        shape = (self.layer.padding, self.layer.stride, self.layer.dilation, self.layer.groups)
        return torch.ops.mkldnn._reorder_convolution_weight(weight, *shape, [1, *x.shape[1:]])
