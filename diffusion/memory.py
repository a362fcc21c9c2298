"""How much memory a training step takes, and how large a batch may be for it to fit."""

import math
from collections.abc import Callable

import psutil
import torch
from torch import Tensor

MARGIN = 1.25  # buffers of kernels and of the backward pass, on top of what autograd keeps


def saved_bytes(loss: Callable[[], Tensor], limit: float = math.inf) -> int:
    """Bytes that are kept from the forward pass for the backward pass, weights not counted.

    MemoryError as soon as they are more than ``limit``: the machine need not run into it.
    """
    storages, total = set[int](), 0
    alive: list[Tensor] = []  # so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        storage = tensor.untyped_storage()
        if not (tensor.is_leaf and tensor.requires_grad) and storage.data_ptr() not in storages:
            storages.add(storage.data_ptr())
            total += storage.nbytes()
            alive.append(tensor)
        if total > limit:
            raise MemoryError(f"more than {limit} bytes")
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss()
    return total


def free_bytes(device: torch.device) -> int:
    """Memory that nobody uses."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def largest_micro_batch(
    share: int, loss: Callable[[int], Tensor], device: torch.device, reserve: int, free: int | None = None
) -> int:
    """The largest divisor of ``share`` whose step fits beside ``reserve`` bytes; at least 1.

    ``loss(n)`` is the loss of n pictures. What one keeps says what fits; a GPU then proves it by a backward pass.
    """
    budget = (free_bytes(device) if free is None else free) - reserve
    each = saved_bytes(lambda: loss(1)) * MARGIN
    candidates = [n for n in range(share, 0, -1) if share % n == 0 and (n == 1 or n * each <= budget)]
    for count in candidates:
        if device.type != "cuda" or _runs(lambda count=count: loss(count)):  # type: ignore[misc]
            return count
    return 1


def _runs(loss: Callable[[], Tensor]) -> bool:
    try:
        loss().backward()
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        torch.cuda.empty_cache()
