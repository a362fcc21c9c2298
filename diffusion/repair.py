"""What is tried when drawing fails, before anybody hears that it did: one rung after another, and each of them is said.

===========================================  =======================================================================
the autoencoder's numbers are not finite     the picture's in bfloat16, then in float32
the U-Net's numbers are not finite           the picture in float32, from the same noise
memory is short                              the autoencoder in tiles; half as many pictures at once; on a GPU only the
                                             network that is at work
===========================================  =======================================================================

Precision is the matter of one picture: whoever was beside it or before it is drawn as was asked for, so what it records
draws it again, also where nothing helps this one. Memory is the matter of a call. At its end the model is what it was,
to the last bit.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from types import TracebackType
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor, nn

from diffusion import loading, memory
from diffusion.models import previews
from diffusion.models.folder import Model
from diffusion.models.networks import (
    AutoencoderNotFinite,
    NotFinite,
    UNetNotFinite,
    decode,
    encode,
    first_weight,
    tiled,
)
from diffusion.notices import Repaired, is_short, tell
from diffusion.settings import Shot

TILES = (512, 256)  # pixels; the smaller they are, the more a tile's colours depend on what it shows
FINER = {torch.float16: torch.bfloat16, torch.bfloat16: torch.float32}
LARGE = 1024 * 1024  # pixels from which on memory is looked at before an autoencoder runs into its end
FAULTS = (FloatingPointError, MemoryError, RuntimeError)

Rung = Callable[[], str | None]  # does something in another way from now on and says so, or has no other way left
Rungs = Mapping[type[Exception], Sequence[Rung]]


class BeginAgain(RuntimeError):
    """Pictures of a batch went through the autoencoder in one way and are to come back in another: that would show."""


@dataclass(kw_only=True)
class Batch:
    """Pictures that go through the networks together, and how each of them is drawn."""

    shots: Sequence[Shot]
    finer: bool = False  # what draws works in float32
    before: tuple[str, ...] = ()  # what was repaired in earlier attempts

    def __post_init__(self) -> None:
        self.said = [list(self.before) for _ in self.shots]  # of each picture
        self.tiles: list[int | None] = [None] * len(self.shots)
        self.coded = [False] * len(self.shots)  # whether the autoencoder has seen it

    def fits(self, whose: Iterable[int], tile: int | None) -> bool:
        """Whether the autoencoder has seen none of the pictures yet, or in such tiles."""
        return all(self.tiles[n] == tile for n in whose if self.coded[n])

    def see(self, whose: Iterable[int], tile: int | None, said: Sequence[str]) -> None:
        """The autoencoder has seen some of the pictures, in such tiles, and this was repaired on the way there."""
        for n in whose:
            self.coded[n], self.tiles[n] = True, tile
            self.said[n] += [text for text in said if text not in self.said[n]]

    def parts(self, most: int | None) -> "list[Batch]":
        """The same pictures before the first step, in batches of at most ``most``."""
        step = len(self.shots) if most is None else most
        return [replace(self, shots=self.shots[start : start + step]) for start in range(0, len(self.shots), step)]


@dataclass(kw_only=True)
class Repairs:
    """How a call draws from now on, and what was repaired on the way there. A context: at its end all is as before."""

    model: Model
    control: Any = None  # the network of a ControlNet
    size: tuple[int, int] = (0, 0)  # width and height of finished pictures
    tile: int | None = None  # pixels of the tiles that the autoencoder works in; None: whole pictures
    whole: bool = False  # tiles would show: edges are to fit each other
    most: int | None = None  # pictures at once
    said: list[str] = field(default_factory=list)  # of all that is drawn from now on
    _lost: dict[Shot, Exception] = field(default_factory=dict)  # pictures that nothing helped
    _undo: ExitStack = field(default_factory=ExitStack)

    def __post_init__(self) -> None:
        self.dtype = self.model.dtype  # as it was asked for: in that, what failed fails again and is repaired again

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, at: TracebackType | None) -> None:
        self._undo.close()

    # --- the autoencoder

    def decode(self, latents: Tensor, batch: Batch | None = None) -> list[Image.Image]:
        """Pictures of latents ``(B, C, h, w)``, those of the batch where there is one."""
        each = enumerate(latents.split(1))
        return [self._coded(partial(decode, self.model.vae, one), batch, [n])[0] for n, one in each]

    def encode(self, images: Sequence[Image.Image], batch: Batch) -> Tensor:
        """The mean of the posterior of each picture, ``(B, C, h, w)``, on the scale that the U-Net sees.

        One picture is that which all of the batch begin from.
        """
        whose = [range(len(batch.shots))] if len(images) == 1 else [[n] for n in range(len(images))]
        each = zip(images, whose, strict=True)
        return torch.cat([self._coded(partial(encode, self.model.vae, [image]), batch, who) for image, who in each])

    def preview(self, latents: Tensor, *, exact: bool) -> list[Image.Image]:
        """What latents look like: by the linear map of the recipe, by one that is fitted, or decoded."""
        if exact:
            return self.decode(latents)
        recipe = self.model.recipe
        if recipe.latent_rgb is None:
            recipe.latent_rgb = self._coded(partial(previews.fit, self.model.vae))
        return previews.draw(latents, recipe.latent_rgb, self.model.factor)

    def _coded(self, attempt: Callable[[], Any], batch: Batch | None = None, whose: Sequence[int] = ()) -> Any:
        """What the autoencoder makes of pictures of a batch, in a precision that is theirs alone."""
        finer = list[str]()
        with ExitStack() as undo:
            rungs: Rungs = {
                AutoencoderNotFinite: (partial(self._finer_autoencoder, undo),),
                MemoryError: (self._tiles,),
            }
            while batch is None or batch.fits(whose, self.tile):
                try:
                    with tiled(self.model.vae, self.tile):
                        found = attempt()
                except FAULTS as fault:
                    said = self._climb(fault, rungs)
                    if said is None and batch is not None and isinstance(fault, NotFinite):
                        raise type(fault)(str(fault), [n in whose for n in range(len(batch.shots))]) from fault
                    if said is None:
                        raise
                    finer += [] if is_short(fault) else [said]
                    continue
                if batch is not None:
                    batch.see(whose, self.tile, (*self.said, *finer))
                return found
        raise BeginAgain

    # --- a batch

    @contextmanager
    def working(self, batch: Batch) -> Iterator[None]:
        """Within the block the networks are as this batch needs them."""
        self._foresee()
        with ExitStack() as undo:
            if batch.finer:
                self._refine(undo)
            yield

    def again(self, batch: Batch, fault: Exception) -> list[Batch]:
        """The batches to draw in place of one that failed. The fault again, and what was tried, if nothing is left.

        Pictures that no precision helps are left out; ``end`` tells of them.
        """
        if isinstance(fault, BeginAgain):
            return [batch]
        if isinstance(fault, NotFinite) and fault.which:
            return list(self._apart(batch, fault))
        if not is_short(fault):
            raise fault
        rungs: Rungs = {MemoryError: (lambda: self._halves(len(batch.shots)), self._offload)}
        if self._climb(fault, rungs) is None:
            tried = "; ".join(text.removeprefix("out of memory: ") for text in self.said)
            remedy = "out of memory: ask for a smaller picture"
            raise MemoryError(f"{remedy} (what was tried: {tried})" if tried else remedy) from fault
        return [batch]

    def end(self) -> None:
        """When all is drawn. FloatingPointError for the pictures that nothing helped."""
        if self._lost:
            seeds, fault = ", ".join(str(shot.seed) for shot in self._lost), next(iter(self._lost.values()))
            raise FloatingPointError(f"{fault}: no picture of seed {seeds}") from fault

    def _apart(self, batch: Batch, fault: NotFinite) -> Iterator[Batch]:
        """Neighbours that failed, and those that did not: in float32 and as they were, in their order."""
        how: dict[str, Any] | None = None
        if isinstance(fault, UNetNotFinite) and not batch.finer and self.dtype != torch.float32:
            how = {"finer": True, "before": (*batch.before, self._say(f"{fault}: drawn again in float32"))}
        for failed, some in groupby(zip(batch.shots, fault.which, strict=True), key=lambda pair: pair[1]):
            shots = [shot for shot, _ in some]
            if not failed:
                yield replace(batch, shots=shots)
            elif how is not None:
                yield replace(batch, shots=shots, **how)
            else:
                self._lost |= dict.fromkeys(shots, fault)

    # --- the rungs

    def _climb(self, fault: Exception, rungs: Rungs) -> str | None:
        """Take the first rung that there is for a fault. What is said of it; None: there is none."""
        short = is_short(fault)
        for rung in rungs.get(MemoryError if short else type(fault), ()):
            if (repair := rung()) is not None:
                memory.give_back(self.model.device)
                return self._remember(f"out of memory: {repair}") if short else self._say(f"{fault}: {repair}")
        return None

    def _remember(self, text: str) -> str:
        """Say what holds from now on."""
        self.said.append(text)
        return self._say(text)

    def _say(self, text: str) -> str:
        tell(Repaired(text))
        return text

    def _finer_autoencoder(self, undo: ExitStack) -> str | None:
        dtype = FINER.get(first_weight(self.model.vae).dtype)
        if dtype is None:
            return None
        undo.close()  # from what the weights were, and not from what is left of them in the precision before
        _cast([self.model.vae], dtype, undo)
        return f"it works in {str(dtype).removeprefix('torch.')}"

    def _refine(self, undo: ExitStack) -> None:
        """Straight to float32: what is past the range of float16 in a U-Net is past the precision of bfloat16 soon."""
        networks = [self.model.unet, *self.model.text_encoders, *([] if self.control is None else [self.control])]
        if self.model.compiled is not None:  # its weights are constants
            undo.callback(setattr, self.model.unet, "forward", self.model.unet.forward)
            self.model.unet.forward = self.model.compiled.plain
        _cast(networks, torch.float32, undo)

    def _foresee(self) -> None:
        """A machine whose memory is lent out twice ends a process that takes it; so it is not tried on the CPU."""
        if self.tile is not None or self.size[0] * self.size[1] <= LARGE or self.model.device.type != "cpu":
            return
        if memory.decoding_bytes(self.model, self.size) > memory.free_bytes(self.model.device):
            repair = self._tiles()
            if repair is not None:
                self._remember(f"memory is short: {repair}")

    def _tiles(self) -> str | None:
        before = max(self.size) if self.tile is None else self.tile
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
        """A compiled network stays where its constants are."""
        if self.model.device.type == "cpu" or self.model.offload is not None or self.model.compiled is not None:
            return None
        loading.offload(self.model, self.control, self.model.device)
        self._undo.callback(self._bring_home)
        return "only the network that is at work is on the device"

    def _bring_home(self) -> None:
        offload, self.model.offload = self.model.offload, None
        if offload is not None:
            offload.end()


def _cast(networks: Iterable[nn.Module], dtype: torch.dtype, undo: ExitStack) -> None:
    """Weights in another precision; a cast back would lose bits, so they are kept, where a GPU has room for others."""
    tensors = (tensor for network in networks for tensor in (*network.parameters(), *network.buffers()))
    with torch.inference_mode(False):
        for tensor in tensors:
            if tensor.is_floating_point():
                undo.callback(_restore, tensor, tensor.data.cpu())
                tensor.data = tensor.data.to(dtype)


def _restore(tensor: Tensor, kept: Tensor) -> None:
    with torch.inference_mode(False):
        tensor.data = kept.to(tensor.device)
