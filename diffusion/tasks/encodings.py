"""What frozen networks make of pictures and captions: computed once, and kept on disk."""

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffusion.data.cache import Cache, Entry, Kept
from diffusion.data.dataset import Batch, to_tensor
from diffusion.data.source import Picture
from diffusion.models import networks, text
from diffusion.models.folder import Model
from diffusion.pixels import View

Shown = Sequence[tuple[Picture, View]]


class Encodings:
    """Latents of views of pictures, and contexts of captions, of one model."""

    def __init__(self, model: Model, folder: Path, quiet: bool = False) -> None:
        self.model, self.folder, self.quiet = model, folder, quiet

    def latents(self, shown: Shown) -> Kept:
        """``mean`` and ``std`` ``(C, h, w)`` of every view, on the scale that the U-Net sees."""

        def make(places: list[int]) -> list[Entry]:
            pixels = to_tensor(np.stack([shown[place][0].pixels(shown[place][1]) for place in places]))
            means, stds = networks.to_latents(self.model.vae, pixels)
            if not torch.isfinite(means).all():
                raise FloatingPointError(
                    f"the autoencoder's latents of {shown[places[0]][0].file} and others are not finite: use fp32"
                )
            return [{"mean": mean, "std": std} for mean, std in zip(means, stds, strict=True)]

        kinds = [(view.width, view.height) for _, view in shown]
        return self._pictures.fill(self._paths(shown), make, kinds)

    def captions(self, captions: Sequence[str]) -> Callable[[list[str]], Batch]:
        """A function from captions, each one of these, to their contexts ``(B, L, D)``."""

        def make(places: list[int]) -> list[Entry]:
            with torch.no_grad():
                found = text.encode(self.model, text.tokenize(self.model, [captions[place] for place in places]))
            return [{name: value[n] for name, value in found.items()} for n in range(len(places))]

        kept = self._captions.fill(self._caption_paths(captions), make, what="captions")
        places = {caption: place for place, caption in enumerate(captions)}

        def look_up(wanted: list[str]) -> Batch:
            found = [kept[places[caption]] for caption in wanted]
            return {name: torch.stack([entry[name] for entry in found]) for name in found[0]}

        return look_up

    def note(self, shown: Shown, captions: Sequence[str]) -> str:
        """How large it is, and how much of it is there."""
        vae, widths = self.model.vae, [encoder.config.hidden_size for encoder in self.model.text_encoders]
        cells = sum(view.width * view.height for _, view in shown) / networks.spatial_factor(vae) ** 2
        numbers = 2 * vae.config.latent_channels * cells
        numbers += len(captions) * self.model.tokenizer.model_max_length * sum(widths)
        there = sum(path.is_file() for path in self._paths(shown))
        said = sum(path.is_file() for path in self._caption_paths(captions))
        note = f"{4 * numbers / 2**20:.1f} MiB in {self.folder}, {there:,} of {len(shown):,} views there"
        return note + (f", {said:,} of {len(captions):,} captions" if captions else "")

    def _paths(self, shown: Shown) -> list[Path]:
        return [self._pictures.picture_path(picture, view) for picture, view in shown]

    def _caption_paths(self, captions: Sequence[str]) -> list[Path]:
        return [self._captions.path(caption.encode(), "caption") for caption in captions]

    @cached_property
    def _pictures(self) -> Cache:
        vae = self.model.vae
        return Cache(self.folder, _digest(_facts(vae), vae.encoder, vae.quant_conv), self.quiet)

    @cached_property
    def _captions(self) -> Cache:
        spelling = " ".join(f"{t.backend_tokenizer.to_str()} {t.model_max_length}" for t in self.model.tokenizers)
        return Cache(self.folder, _digest(f"{spelling} {self.model.zero_empty}", *self.model.text_encoders), self.quiet)


def _facts(vae: Any) -> str:
    return str(sorted(item for item in vae.config.items() if not item[0].startswith("_")))  # not where it was read


def _digest(facts: str, *networks: nn.Module | None) -> str:
    """Of the weights and whatever else an encoding depends on."""
    digest = hashlib.sha256(facts.encode())
    for network in networks:
        for name, weight in network.state_dict().items() if network is not None else ():
            digest.update(name.encode() + _bytes(weight))
    return digest.hexdigest()


def _bytes(weight: Tensor) -> bytes:
    return weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
