"""Learning pictures as latents: an autoencoder, or its decoder alone."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from diffusion.data.dataset import Batch, PixelSet, to_tensor
from diffusion.data.source import Picture
from diffusion.models import folder, networks
from diffusion.models.group_norm import speed_up_group_norm
from diffusion.models.networks import encode_pixels
from diffusion.pixels import View
from diffusion.places import find_model
from diffusion.schema import Config, Loss
from diffusion.tasks.task import mean_of_each, probe_seed


class ReconstructionLoss(nn.Module):
    """KL-regularised reconstruction (Kingma & Welling 1312.6114; Rombach et al. 2112.10752)."""

    def __init__(self, vae: Any, weights: Loss) -> None:
        super().__init__()
        self.vae, self.weights = vae, weights
        self.critic = critic() if weights.adversarial > 0 else None

    def forward(self, batch: Batch) -> Tensor:
        w, x = self.weights, batch["pixels"].contiguous(memory_format=torch.channels_last)
        posterior = self.vae.encode(x).latent_dist
        latents = posterior.mean + posterior.std * batch["noise"]
        drawn = self.vae.decode(latents).sample
        error = (drawn - x).float()
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar)
        loss = (
            w.l1 * mean_of_each(error.abs())
            + w.mse * mean_of_each(error.square())
            + w.gradient * (mean_of_each(error.diff(dim=3).abs()) + mean_of_each(error.diff(dim=2).abs()))
            + w.kl * mean_of_each(kl.float())
        )
        return loss if self.critic is None else loss + self._contest(self.critic, x, drawn, batch.get("step"))

    def _contest(self, judge: nn.Module, x: Tensor, drawn: Tensor, step: Tensor | None) -> Tensor:
        """The hinge losses of both sides in one sum; each side's gradient stops at the other's weights."""
        frozen = {name: weight.detach() for name, weight in judge.named_parameters()}
        fooled = -mean_of_each(torch.func.functional_call(judge, frozen, drawn).float())
        real, false = judge(x).float(), judge(drawn.detach()).float()
        judged = 0.5 * mean_of_each((1 - real).relu() + (1 + false).relu())
        joined = 1.0 if step is None else (step >= self.weights.adversarial_after).float()
        return joined * (self.weights.adversarial * fooled + judged)


def critic(channels: int = 64) -> nn.Sequential:
    """A discriminator that judges patches (Isola et al. 1611.07004, section 3.2.2), normalised by groups.

    Pixels ``(B, 3, H, W)`` to opinions ``(B, 1, H/8, W/8)``, of at least one patch.
    """
    layers: list[nn.Module] = []
    for n, width in enumerate((3, channels, 2 * channels)):
        out = channels * 2**n
        layers += [nn.Conv2d(width, out, 4, 2, 1), *([nn.GroupNorm(8, out)] if n else []), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(4 * channels, 1, 3, 1, 1))


class AutoencoderTask:
    """Trains an ``AutoencoderKL`` on crops; what it saves has latents of zero mean and unit variance a channel.

    With ``model.train_encoder: false`` the decoder alone learns on: latents stay what they were, and so does all that
    was trained on them.
    """

    def __init__(self, config: Config, pictures: list[Picture], device: torch.device) -> None:
        if config.data.buckets:
            raise ValueError("task autoencoder learns from square crops: set data.buckets=false")
        if config.data.flip or config.data.crops > 1:
            raise ValueError("task autoencoder crops at random and does not mirror: leave out data.flip and data.crops")
        crop = config.data.size if config.data.crop is None else config.data.crop
        if crop > config.data.size:
            raise ValueError(f"data.crop {crop} is more than data.size {config.data.size}")
        self.size, self.background = config.data.size, config.data.background
        self.pictures = pictures
        self.vae = _autoencoder(config).to(device, memory_format=torch.channels_last).train()
        factor = networks.spatial_factor(self.vae)
        for name, pixels in (("data.crop", crop), ("data.size", config.data.size)):
            if pixels % factor:
                raise ValueError(f"{name} {pixels} is not a multiple of this autoencoder's {factor}")
        self.train_encoder = config.model.train_encoder
        if not self.train_encoder:
            self.vae.requires_grad_(False)
            self.vae.decoder.requires_grad_(True)
            self.vae.post_quant_conv.requires_grad_(True)
        self.network: nn.Module = self.vae
        if not config.train.compile:
            speed_up_group_norm(self.vae)
        if config.train.gradient_checkpointing:
            self.vae.enable_gradient_checkpointing()
        self.module: nn.Module = ReconstructionLoss(self.vae, config.loss).to(device)
        self.dataset = PixelSet(
            pictures=pictures,
            size=config.data.size,
            crop=crop,
            seed=config.seed,
            background=config.data.background,
            latent_channels=self.vae.config.latent_channels,
            factor=networks.spatial_factor(self.vae),
        )

    def parameters(self) -> list[nn.Parameter]:
        return list(self.vae.parameters())

    def example(self, count: int) -> Batch:
        side, channels = self.dataset.crop, self.dataset.latent_channels
        cells = side // self.dataset.factor
        return {"pixels": torch.zeros(count, 3, side, side), "noise": torch.zeros(count, channels, cells, cells)}

    def refuses(self, picture: Picture) -> str | None:
        return None

    def cache_note(self) -> str:
        return "none: pixels are read as they are needed"

    def probe(self, pictures: list[Picture]) -> PixelSet:
        return dataclasses.replace(self.dataset, pictures=pictures, seed=probe_seed(self.dataset.seed))

    def gathered(self) -> "AutoencoderTask | None":
        vae = networks.unsharded(self.vae)
        if vae is None:
            return None
        whole = copy.copy(self)
        whole.vae = vae
        return whole

    def save(self, path: Path, dtype: torch.dtype | None = None) -> None:
        vae = copy.deepcopy(self.vae).float()
        if self.train_encoder:
            latents = torch.cat([encode_pixels(vae, pixels)[0] for pixels in self._some(512).split(32)])
            networks.normalize_latents(vae, latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3)))
        folder.save_network(vae, path / "vae", dtype)

    def samples(self) -> list[Image.Image]:
        """Pairs of a picture and its reconstruction."""
        pixels = self._some(16)
        with torch.inference_mode():
            decoded = self.vae.decode(encode_pixels(self.vae, pixels)[0]).sample.cpu()
        return networks.to_images(torch.stack([pixels, decoded], dim=1).flatten(0, 1))

    def _some(self, count: int) -> Tensor:
        """At most ``count`` pictures, evenly spaced over the set."""
        chosen = self.pictures[:: max(1, len(self.pictures) // count)][:count]
        view = View(width=self.size, height=self.size, background=self.background)
        return to_tensor(np.stack([picture.pixels(view) for picture in chosen]))


def _autoencoder(config: Config) -> Any:
    """A new autoencoder, or that of ``model.base`` to go on from."""
    m = config.model
    if (m.vae is None) == (m.base is None):
        raise ValueError("task autoencoder needs model.vae, the arguments of the AutoencoderKL to build, or model.base")
    if m.vae is not None and not m.train_encoder:
        raise ValueError("model.train_encoder: false needs a trained encoder: name its folder in model.base")
    if m.vae is not None:
        return networks.build_autoencoder(m.vae)
    base = Path(str(m.base))
    return folder.load_vae(base if (base / "vae").is_dir() else find_model(base))
