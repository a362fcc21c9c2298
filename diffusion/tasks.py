"""What can be trained: each task is a choice of trainable parameters and a loss, never another loop."""

import copy
import dataclasses
import hashlib
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from diffusion import objectives, rng
from diffusion.config import Config, Data, Loss
from diffusion.data.buckets import nearest, shapes
from diffusion.data.cache import Cache, View
from diffusion.data.captions import choose_caption, lead
from diffusion.data.dataset import Batch, LatentSet, PixelSet, to_tensor
from diffusion.data.pixels import read_pixels, read_size
from diffusion.data.source import Picture
from diffusion.models import folder, networks, text
from diffusion.models.folder import Forward, Model, Recipe
from diffusion.models.group_norm import speed_up_group_norm
from diffusion.pipeline import TextToImage
from diffusion.settings import find_model


class Task(Protocol):
    """What the loop needs to know of a task."""

    module: nn.Module  # trained; module(batch) gives one loss a sample, shape (B,)
    network: nn.Module  # the part that takes the time, which may be compiled

    @property
    def dataset(self) -> Any:
        """Visits -> batch."""

    def parameters(self) -> list[nn.Parameter]:
        """All weights that have to be in memory, those that are not trained included."""

    def cache_note(self) -> str:
        """What is computed once before training, how large it is, and whether it is there."""

    def probe(self, pictures: list[Picture]) -> Any:
        """A dataset of other pictures that draws by another seed than training, without augmentation."""

    def save(self, path: Path, dtype: torch.dtype | None = None) -> None:
        """Write what was trained as a model folder."""

    def samples(self) -> list[Image.Image]:
        """Pictures that show how far it is, the same ones each time."""


def build(config: Config, pictures: list[Picture], device: torch.device) -> Task:
    """The task that the config names, with new weights drawn from the run's seed."""
    torch.manual_seed(config.seed)
    if config.task == "autoencoder":
        return AutoencoderTask(config, pictures, device)
    return TextToImageTask(config, pictures, device)


# --- autoencoder ------------------------------------------------------------------------------------------------------


class ReconstructionLoss(nn.Module):
    """KL-regularised reconstruction (Kingma & Welling 1312.6114; Rombach et al. 2112.10752, without the critic)."""

    def __init__(self, vae: Any, weights: Loss) -> None:
        super().__init__()
        self.vae, self.weights = vae, weights

    def forward(self, batch: Batch) -> Tensor:
        w, x = self.weights, batch["pixels"].contiguous(memory_format=torch.channels_last)
        posterior = self.vae.encode(x).latent_dist
        latents = posterior.mean + posterior.std * batch["noise"]
        error = (self.vae.decode(latents).sample - x).float()
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar)
        return (
            w.l1 * _mean(error.abs())
            + w.mse * _mean(error.square())
            + w.gradient * (_mean(error.diff(dim=3).abs()) + _mean(error.diff(dim=2).abs()))
            + w.kl * _mean(kl.float())
        )


class AutoencoderTask:
    """Trains an ``AutoencoderKL`` on crops; what it saves has latents of zero mean and unit variance a channel.

    With ``model.train_encoder: false`` the decoder alone learns on: latents stay what they were, and so does all that
    was trained on them.
    """

    def __init__(self, config: Config, pictures: list[Picture], device: torch.device) -> None:
        if config.data.buckets:
            raise ValueError("task autoencoder learns from square crops: set data.buckets=false")
        self.size, self.background = config.data.size, config.data.background
        self.pictures = pictures
        self.vae = _autoencoder(config).to(device, memory_format=torch.channels_last).train()
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
        self.module: nn.Module = ReconstructionLoss(self.vae, config.loss)
        self.dataset = PixelSet(
            pictures=pictures,
            size=config.data.size,
            crop=config.data.size if config.data.crop is None else config.data.crop,
            seed=config.seed,
            background=config.data.background,
            latent_channels=self.vae.config.latent_channels,
            factor=networks.spatial_factor(self.vae),
        )

    def parameters(self) -> list[nn.Parameter]:
        return list(self.vae.parameters())

    def cache_note(self) -> str:
        return "none: pixels are read as they are needed"

    def probe(self, pictures: list[Picture]) -> PixelSet:
        return dataclasses.replace(self.dataset, pictures=pictures, seed=_probe_seed(self.dataset.seed))

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
        return to_tensor(np.stack([read_pixels(picture.file, self.size, self.background) for picture in chosen]))


@torch.no_grad()
def encode_pixels(vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation ``(B, C, h, w)`` of the posterior of pixels ``(B, 3, H, W)``."""
    posterior = vae.encode(pixels.to(vae.device)).latent_dist
    return posterior.mean, posterior.std


# --- text to image ----------------------------------------------------------------------------------------------------


class DenoisingLoss(nn.Module):
    """The squared error of the prediction at a drawn time, weighted (Ho et al. 2006.11239, eq. 14 and its kin)."""

    def __init__(self, unet: Any, text_encoder: Any, forward_process: Forward, weights: Loss) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder
        self.schedule, self.prediction, self.weights = forward_process.schedule(), forward_process.prediction, weights

    def forward(self, batch: Batch) -> Tensor:
        # forward process: a time for each sample, and the picture at that time
        w, x0, eps = self.weights, batch["latents"], batch["noise"]
        u = objectives.unit_time(w.density, batch["u"], w.density_mean, w.density_std)
        t = self.schedule.time_from_unit(u)
        alpha, sigma = (level.to(x0.dtype).view(-1, 1, 1, 1) for level in self.schedule.level_at(t))
        shown = eps + w.input_perturbation * batch["perturbation"] if w.input_perturbation > 0 else eps
        x = (alpha * x0 + sigma * shown).contiguous(memory_format=torch.channels_last)

        # prediction
        context = text.encode(self.text_encoder, batch["tokens"])
        output = self.unet(x, t, encoder_hidden_states=context, return_dict=False)[0].to(x0.dtype)

        # weighted squared error
        error = (output - objectives.target(self.prediction, x0, eps, alpha, sigma)).square()
        return _mean(error) * objectives.loss_weight(w.weighting, self.prediction, alpha, sigma, w.gamma).flatten()


class TextToImageTask:
    """Trains a U-Net, and a text encoder where one is built anew, on the latents of a finished autoencoder."""

    def __init__(self, config: Config, pictures: list[Picture], device: torch.device) -> None:
        self.config = config
        self.model = _assemble(config, pictures)
        self.model.vae.to(device).requires_grad_(False)
        self.model.unet.to(device, memory_format=torch.channels_last).train()
        self.model.text_encoder.to(device).train().requires_grad_(config.model.text_encoder is not None)
        if not config.train.compile:  # the compiler fuses group norm by itself
            speed_up_group_norm(self.model.unet)
        if config.train.gradient_checkpointing:
            self.model.unet.enable_gradient_checkpointing()
        self.module: nn.Module = DenoisingLoss(
            self.model.unet, self.model.text_encoder, self.model.forward, config.loss
        )
        self.network: nn.Module = self.model.unet
        self.pictures = pictures
        self._check_captions(pictures)
        cells = networks.spatial_factor(self.model.vae) * 2 ** (len(self.model.unet.config.block_out_channels) - 1)
        if config.data.buckets and config.data.bucket_step % cells:
            raise ValueError(f"data.bucket_step {config.data.bucket_step} is not a multiple of this model's {cells}")

    @cached_property
    def dataset(self) -> LatentSet:
        """Encodes the pictures when it is first asked for, if no cache of them is found."""
        return LatentSet(
            pictures=self.pictures,
            posteriors=self._posteriors(self.pictures),
            seed=self.config.seed,
            offset_noise=self.config.loss.offset_noise,
            input_perturbation=self.config.loss.input_perturbation,
            caption=self._caption,
            tokenize=partial(text.tokenize, self.model.tokenizer),
        )

    def parameters(self) -> list[nn.Parameter]:
        model = self.model
        return [p for network in (model.unet, model.text_encoder, model.vae) for p in network.parameters()]

    def cache_note(self) -> str:
        views = [view for picture in self.pictures for view in self._views(picture)]
        cells = sum(view.width * view.height for view in views) / networks.spatial_factor(self.model.vae) ** 2
        size = 8 * self.model.vae.config.latent_channels * cells / 2**20
        return f"{size:.1f} MiB in {self._cache.folder}, {self._cache.count(views):,} of {len(views):,} there"

    def probe(self, pictures: list[Picture]) -> LatentSet:
        self._check_captions(pictures)
        return dataclasses.replace(
            self.dataset,
            pictures=pictures,
            posteriors=self._posteriors(pictures),
            seed=_probe_seed(self.config.seed),
            in_bins=True,
            caption=lambda picture, _: lead(self.config.data.captions.trigger, picture.text),
        )

    def save(self, path: Path, dtype: torch.dtype | None = None) -> None:
        folder.save_model(self.model, path, dtype)

    def samples(self) -> list[Image.Image]:
        self.module.eval()
        recipe = self.config.recipe
        prompts = recipe.prompts or [picture.text for picture in self.dataset.pictures[:: -(-len(self.dataset) // 16)]]
        images = TextToImage(self.model)(prompts, seed=0)
        self.module.train()
        return images

    def _caption(self, picture: Picture, visit: int) -> str:
        c = self.config.data.captions
        return choose_caption(
            picture,
            visit,
            self.config.seed,
            self._fits,
            dropout=c.dropout,
            keywords=c.keywords,
            fillers=c.fillers,
            shuffle_tags=c.shuffle_tags,
            keep_tags=c.keep_tags,
            templates=c.templates,
            trigger=c.trigger,
        )

    def _check_captions(self, pictures: list[Picture]) -> None:
        """Refuse captions that the encoder cannot read whole before anything is computed."""
        trigger = self.config.data.captions.trigger
        captions = [(picture.file, lead(trigger, text)) for picture in pictures for text in picture.texts]
        long = [(file, caption) for file, caption in captions if not self._fits(caption)]
        if long:
            raise ValueError(
                f"{len(long)} captions are longer than the {self.model.tokenizer.model_max_length - 2} tokens that the "
                f"text encoder reads; first {long[0][0]}: {long[0][1]!r}"
            )

    def _fits(self, caption: str) -> bool:
        return len(self.model.tokenizer(caption, verbose=False).input_ids) <= self.model.tokenizer.model_max_length

    def _posteriors(self, pictures: list[Picture]) -> list[list[tuple[Tensor, Tensor]]]:
        """Of every view of each picture the mean and deviation of its latents, on the scale that the U-Net sees."""
        views = [view for picture in pictures for view in self._views(picture)]
        vae = self.model.vae.config
        shift = vae.shift_factor or 0
        found = [
            ((mean - shift) * vae.scaling_factor, std * vae.scaling_factor)
            for mean, std in self._cache.fill(views, partial(encode_pixels, self.model.vae))
        ]
        each = len(views) // len(pictures)
        return [found[start : start + each] for start in range(0, len(found), each)]

    def _views(self, picture: Picture) -> list[View]:
        data = self.config.data
        width, height = (
            nearest(read_size(picture.file), bucket_shapes(data)) if data.buckets else (data.size, data.size)
        )
        return [
            View(file=picture.file, width=width, height=height, background=data.background, flip=flip)
            for flip in ((False, True) if data.flip else (False,))
        ]

    @cached_property
    def _cache(self) -> Cache:
        vae = self.model.vae
        facts = sorted(item for item in vae.config.items() if not item[0].startswith("_"))  # not where it was read
        digest = hashlib.sha256(str(facts).encode())
        for name, weight in (*vae.encoder.state_dict().items(), *vae.quant_conv.state_dict().items()):
            digest.update(name.encode() + weight.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return Cache(Path(self.config.output) / "cache", digest.hexdigest())


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


def _assemble(config: Config, pictures: list[Picture]) -> Model:
    """The parts that the config describes are built, the others are read from ``model.base``."""
    m = config.model
    if m.base is not None:
        new = [name for name in ("autoencoder", "tokenizer", "text_encoder", "unet") if getattr(m, name) is not None]
        if new:
            raise ValueError(f"model.base brings its own model.{new[0]}: give one or the other")
        model = folder.load_model(find_model(m.base))
        model.recipe = _recipe(config, pictures, model.recipe)
        return model
    if m.autoencoder is None or m.tokenizer is None or m.text_encoder is None or m.unet is None:
        raise ValueError(
            "from scratch, text_to_image needs model.autoencoder, model.tokenizer, model.text_encoder and model.unet"
        )
    captions = {caption for picture in pictures for caption in picture.keywords}
    captions |= {text for picture in pictures for text in picture.texts} | set(config.data.captions.fillers)
    captions |= {config.data.captions.trigger, *config.data.captions.templates} - {""}
    tokenizer = text.train_tokenizer(captions, m.tokenizer.vocab_size, m.tokenizer.max_length)
    return Model(
        tokenizer=tokenizer,
        text_encoder=networks.build_text_encoder(m.text_encoder, tokenizer),
        unet=networks.build_unet(m.unet),
        vae=folder.load_vae(m.autoencoder),
        forward=Forward(beta_schedule=m.beta_schedule, zero_terminal_snr=m.zero_terminal_snr, prediction=m.prediction),
        recipe=_recipe(config, pictures, Recipe()),
    )


def _recipe(config: Config, pictures: list[Picture], base: Recipe) -> Recipe:
    """What the config says of generating; what it leaves open is as in the model that was started from."""
    said = {name: value for name, value in dataclasses.asdict(config.recipe).items() if value is not None}
    trained_on = f"{len(pictures)} pictures of {config.data.path}" + (
        f", after {base.trained_on}" * bool(base.trained_on)
    )
    return dataclasses.replace(
        base, **({"prompts": []} | said), width=config.data.size, height=config.data.size, trained_on=trained_on
    )


def bucket_shapes(data: Data) -> list[tuple[int, int]]:
    """The shapes of a run with buckets."""
    return shapes(data.size, data.bucket_step, data.bucket_ratio)


def _probe_seed(seed: int) -> int:
    return rng.name_id(f"probe {seed}")


def _mean(error: Tensor) -> Tensor:
    """The mean over everything but the batch, shape ``(B,)``."""
    return error.flatten(1).mean(dim=1)
