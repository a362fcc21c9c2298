"""How much memory a training step takes, and how large a batch may be for it to fit; what drawing takes."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffusion.models.denoiser import predict
from diffusion.models.folder import Model
from diffusion.models.networks import first_weight, spatial_factor
from diffusion.settings import Settings

if TYPE_CHECKING:
    from diffusion.models.control import Control

KEPT = 107 * 2**20  # by kernels and their libraries once they have run; this and what is below were measured on a CPU
COPIES = 3  # of what is alive: kernels read and write layouts of their own, whose blocks are kept when they are free,
RETAINED = 250 * 2**20  # but for large ones (of 32 MiB with glibc): beyond what is alive this is the most
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


def give_back(device: torch.device) -> None:
    """What PyTorch keeps of a GPU's memory, without using it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


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


class Drawn(NamedTuple):
    """Bytes of the tensors that drawing takes."""

    weights: int
    evaluation: int  # of the U-Net, with a batch and, where it is guided, with its negative prompt
    decoding: int  # of one picture

    @property
    def peak(self) -> int:
        """What a process grows by; a batch is decoded when its last step is done, one picture at a time."""
        return self.weights + taken(max(self.evaluation, self.decoding)) + KEPT

    def __str__(self) -> str:
        """In words."""
        most = "an evaluation of the U-Net" if self.evaluation > self.decoding else "decoding a picture"
        sizes = [f"{count / 2**30:.2f} GiB" for count in (self.peak, self.weights)]
        return f"about {sizes[0]} beside the libraries, {sizes[1]} of it weights, and most in {most} (as on a CPU)"


def drawing_bytes(model: Model, full: Settings, chunks: int = 1, control: "Control | None" = None) -> Drawn:
    """What the tensors of a filled request take, counted on a model without weights: nothing is computed.

    ``chunks`` is how many times the text encoder is asked for a prompt.
    """
    assert isinstance(full.batch_size, int), "plan() gives the batch size"
    net = None if control is None else control.net
    evaluation = _evaluation(model, full, min(full.batch_size, full.count), chunks, net)
    tile = max(full.finished) if full.vae_tiling is None else full.vae_tiling
    decoding = _decoding(model.vae, [min(side, tile) for side in full.finished])
    return Drawn(_weights(model, net), evaluation, decoding)


def decoding_bytes(model: Model, size: Sequence[int]) -> int:
    """What decoding a picture of a width and height takes, of a model with weights, and of one without."""
    return taken(_decoding(_outline(model.vae), size))


def taken(alive: int) -> int:
    """What a process grows by for tensors of so many bytes."""
    return min(COPIES * alive, alive + RETAINED)


def largest_batch(
    model: Model, full: Settings, device: torch.device, chunks: int = 1, control: "Control | None" = None
) -> int:
    """How many pictures of a filled request may be drawn at once beside what is in memory already; at least 1."""
    outline, net = replace(model, unet=_outline(model.unet)), None if control is None else _outline(control.net)
    to_come = _weights(model, net) if model.device.type == "meta" else 0
    budget = free_bytes(device) - KEPT - to_come
    alive = max(budget // COPIES, budget - RETAINED)  # the most of which no more is ``taken``
    first, second = (_evaluation(outline, full, count, chunks, net) for count in (1, 2))
    return max(1, min(full.count, 1 + (alive - first) // (second - first)))


def _outline(network: Any) -> Any:
    """The same network without weights."""
    with torch.device("meta"):
        outline = type(network).from_config(network.config)
        return torch.nn.Module.to(outline, first_weight(network).dtype)  # the stock classes' own complains


def _weights(model: Model, net: Any) -> int:
    networks = [*model.networks.values(), *([] if net is None else [net])]
    return sum(t.nbytes for network in networks for t in (*network.parameters(), *network.buffers()))


def _evaluation(model: Model, full: Settings, count: int, chunks: int, net: Any) -> int:
    """Of a U-Net without weights, and of a ControlNet without, with a batch of so many pictures."""
    rows = count * (1 if full.guidance_scale == 1 else 2)
    width, height = (-(-side // model.factor) for side in full.finished)
    unet, networks = model.unet, [model.unet]
    if net is not None:
        from diffusion.models.control import Controlled  # slow to import

        picture = torch.empty(1, 3, height * model.factor, width * model.factor, device="meta")
        unet, networks = Controlled(model.unet, net, picture, 1.0), [model.unet, net]

    def evaluate() -> None:
        x = torch.empty(rows, model.unet.config.in_channels, height, width, device="meta", dtype=model.dtype)
        predict(unet, x, torch.empty(rows, device="meta"), _condition(model, rows, chunks))

    return _peak(evaluate, (weight for network in networks for weight in network.parameters()))


def _decoding(vae: Any, size: Sequence[int]) -> int:
    """Of an autoencoder without weights, with one picture."""
    width, height = (-(-side // spatial_factor(vae)) for side in size)
    one = torch.empty(1, vae.config.latent_channels, height, width, device="meta", dtype=first_weight(vae).dtype)
    return _peak(lambda: vae.decode(one).sample, vae.parameters())


def _condition(model: Model, rows: int, chunks: int) -> dict[str, Tensor]:
    """What a U-Net is told, in its shape."""
    length = chunks * model.tokenizer.model_max_length
    shapes: dict[str, tuple[int, ...]] = {"context": (rows, length, model.unet.config.cross_attention_dim)}
    if model.text_encoder_2 is not None:
        shapes |= {"pooled": (rows, model.text_encoder_2.config.projection_dim), "sizes": (rows, 6)}
    return {name: torch.empty(shape, device="meta", dtype=model.dtype) for name, shape in shapes.items()}


def _peak(run: Callable[[], Any], weights: Iterable[Tensor]) -> int:
    """The most bytes of new tensors that are alive at once."""
    with torch.inference_mode(), _Attention(), _Living(weights) as living:
        run()
    return living.peak


class _Living(TorchDispatchMode):
    """Which tensors are alive, looked at after each operation."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()
        self.peak = 0
        self._weights = {tensor.untyped_storage()._cdata for tensor in weights}
        self._alive = dict[int, tuple[StorageWeakRef, int]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **({} if kwargs is None else kwargs))
        self._alive = {key: (ref, size) for key, (ref, size) in self._alive.items() if not ref.expired()}
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._weights:
                storage = tensor.untyped_storage()
                self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return made


class _Attention(TorchFunctionMode):
    """Attention as the kernels do it: without the matrix of all queries and keys, which would be counted otherwise."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            return torch.empty_like(args[0])
        return func(*args, **({} if kwargs is None else kwargs))
