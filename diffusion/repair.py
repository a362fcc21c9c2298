"""What is tried when drawing fails, before anybody hears that it did: one rung after another, and each of them is said.

===========================================  =======================================================================
the autoencoder's numbers are not finite     in bfloat16, then in float32
the U-Net's numbers are not finite           in float32, from the same noise
memory is short                              the autoencoder in tiles; half as many pictures at once; on a GPU only the
                                             network that is at work
===========================================  =======================================================================

What was repaired stays so until the end of a call, and then the model is what it was, to the last bit.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor, nn

from diffusion import loading, memory
from diffusion.models.folder import Model
from diffusion.models.networks import AutoencoderNotFinite, UNetNotFinite, decode, encode, first_weight, tiled
from diffusion.notices import Repaired, is_short
from diffusion.settings import Shot

TILES = (512, 256)  # pixels; the smaller they are, the more a tile's colours depend on what it shows
FINER = {torch.float16: torch.bfloat16, torch.bfloat16: torch.float32}
LARGE = 1024 * 1024  # pixels from which on memory is looked at before an autoencoder runs into its end
FAULTS = (FloatingPointError, MemoryError, RuntimeError)

Rung = Callable[[], str | None]  # does something in another way from now on and says so, or has no other way left
Rungs = dict[type[Exception], Sequence[Rung]]


@dataclass(kw_only=True)
class Repairs:
    """How a call draws from now on, and what was repaired on the way there. A context: at its end all is as before."""

    model: Model
    control: Any = None  # the network of a ControlNet
    tile: int | None = None  # pixels of the tiles that the autoencoder works in; None: whole pictures
    whole: bool = False  # tiles would show: edges are to fit each other
    most: int | None = None  # pictures at once
    said: list[str] = field(default_factory=list)
    _undo: ExitStack = field(default_factory=ExitStack)

    def __post_init__(self) -> None:
        self.dtype = self.model.dtype  # as it was asked for: in that, what failed fails again and is repaired again

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, at: TracebackType | None) -> None:
        self._undo.close()

    # --- the autoencoder

    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Pictures of latents ``(B, C, h, w)``."""
        height, width = (side * self.model.factor for side in latents.shape[-2:])
        return self._coded(lambda: decode(self.model.vae, latents), (width, height))

    def encode(self, images: Sequence[Image.Image]) -> Tensor:
        """The mean of the posterior of each picture, ``(B, C, h, w)``, on the scale that the U-Net sees."""
        return self._coded(lambda: encode(self.model.vae, images), images[0].size)

    def _coded(self, attempt: Callable[[], Any], size: tuple[int, int]) -> Any:
        rungs: Rungs = {AutoencoderNotFinite: (self._finer_autoencoder,), MemoryError: (lambda: self._tiles(size),)}
        self._foresee(size)
        while True:
            try:
                with tiled(self.model.vae, self.tile):
                    return attempt()
            except FAULTS as fault:
                if not self._climb(fault, rungs):
                    raise

    def _foresee(self, size: tuple[int, int]) -> None:
        """A machine whose memory is lent out twice ends a process that takes it; so it is not tried on the CPU."""
        if self.tile is not None or size[0] * size[1] <= LARGE or self.model.device.type != "cpu":
            return
        if memory.decoding_bytes(self.model, size) > memory.free_bytes(self.model.device):
            self._say("memory is short", self._tiles(size))

    # --- a batch

    def again(self, shots: Sequence[Shot], fault: Exception) -> list[Sequence[Shot]]:
        """The batches to draw in place of one that failed. The fault again, and what was tried, if nothing is left."""
        rungs: Rungs = {
            UNetNotFinite: (self._finer_network,),
            MemoryError: (lambda: self._halves(len(shots)), self._offload),
        }
        if self._climb(fault, rungs):
            return self.cut(shots)
        if not is_short(fault):
            raise fault
        raise MemoryError("; ".join(["out of memory: ask for a smaller picture", *self.said])) from fault

    def cut(self, shots: Sequence[Shot]) -> list[Sequence[Shot]]:
        """A batch in parts that are small enough."""
        most = len(shots) if self.most is None else self.most
        return [shots[start : start + most] for start in range(0, len(shots), most)]

    # --- the rungs

    def _climb(self, fault: Exception, rungs: Rungs) -> bool:
        """Take the first rung that there is for a fault."""
        kind = MemoryError if is_short(fault) else type(fault)
        for rung in rungs.get(kind, ()):
            if self._say("out of memory" if kind is MemoryError else str(fault), rung()):
                memory.give_back(self.model.device)
                return True
        return False

    def _say(self, fault: str, repair: str | None) -> bool:
        if repair is None:
            return False
        self.said.append(f"{fault}: {repair}")
        warnings.warn(self.said[-1], Repaired, stacklevel=2)
        return True

    def _finer_autoencoder(self) -> str | None:
        dtype = FINER.get(first_weight(self.model.vae).dtype)
        return None if dtype is None else f"it works in {self._cast([self.model.vae], dtype)}"

    def _finer_network(self) -> str | None:
        """Straight to float32: what is past the range of float16 in a U-Net is past the precision of bfloat16 soon."""
        if self.model.dtype == torch.float32:
            return None
        networks = [self.model.unet, *self.model.text_encoders, *([] if self.control is None else [self.control])]
        if self.model.compiled is not None:  # its weights are constants
            self._undo.callback(setattr, self.model.unet, "forward", self.model.unet.forward)
            self.model.unet.forward = self.model.compiled.plain
        return f"drawn again in {self._cast(networks, torch.float32)}"

    def _tiles(self, size: tuple[int, int]) -> str | None:
        before = max(size) if self.tile is None else self.tile
        smaller = [tile for tile in TILES if tile < before and tile % (4 * self.model.factor) == 0]
        if self.whole or not smaller:
            return None
        self.tile = smaller[0]
        return f"the autoencoder works in tiles of {self.tile} pixels"

    def _halves(self, count: int) -> str | None:
        if count == 1:
            return None
        self.most = -(-count // 2)
        return f"drawn {self.most} at once" if self.most > 1 else "drawn one by one"

    def _offload(self) -> str | None:
        if self.model.device.type == "cpu" or self.model.offload is not None:
            return None
        loading.offload(self.model, self.control, self.model.device)
        self._undo.callback(self._bring_home)
        return "only the network that is at work is on the device"

    def _bring_home(self) -> None:
        offload, self.model.offload = self.model.offload, None
        if offload is not None:
            offload.end()

    def _cast(self, networks: Iterable[nn.Module], dtype: torch.dtype) -> str:
        """Weights in another precision until the end of the call; they are kept, for a cast back would lose bits."""
        tensors = (tensor for network in networks for tensor in (*network.parameters(), *network.buffers()))
        with torch.inference_mode(False):
            for tensor in tensors:
                if tensor.is_floating_point():
                    self._undo.callback(setattr, tensor, "data", tensor.data)
                    tensor.data = tensor.data.to(dtype)
        return str(dtype).removeprefix("torch.")
