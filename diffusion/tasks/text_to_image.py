"""Learning to draw what a caption says, on the latents of a finished autoencoder."""

import copy
import dataclasses
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from diffusion import objectives
from diffusion.data.buckets import nearest, shapes
from diffusion.data.captions import choose_caption, lead, variants
from diffusion.data.dataset import Batch, LatentSet, to_tensor
from diffusion.data.source import Picture
from diffusion.models import adapters, embeddings, folder, lora, networks, previews, text
from diffusion.models.denoiser import predict
from diffusion.models.folder import Forward, Model, Recipe
from diffusion.models.group_norm import speed_up_group_norm
from diffusion.models.networks import to_latents
from diffusion.pipeline import TextToImage
from diffusion.pixels import View
from diffusion.places import find_model
from diffusion.schema import Config, Data, Loss
from diffusion.settings import Settings
from diffusion.tasks.distillation import DistillationLoss, frozen_copy
from diffusion.tasks.encodings import Encodings
from diffusion.tasks.task import mean_of_each, probe_seed

PREVIEWED = 32  # pictures that the colours of previews are fitted on


class DenoisingLoss(nn.Module):
    """The squared error of the prediction at a drawn time, weighted (Ho et al. 2006.11239, eq. 14 and its kin)."""

    def __init__(self, model: Model, weights: Loss) -> None:
        super().__init__()
        self.unet, self.text_encoder, self.text_encoder_2 = model.unet, model.text_encoder, model.text_encoder_2
        self.parts = model  # what ``text.encode`` reads
        self.encode = partial(to_latents, model.vae)  # not one of the modules that are trained and saved
        self.schedule, self.prediction, self.weights = model.schedule, model.prediction, weights

    def forward(self, batch: Batch) -> Tensor:
        # what the networks before have made of the picture and its caption, or make of them now
        w, x0, eps = self.weights, self._latents(batch), batch["noise"]
        condition = batch if "context" in batch else batch | text.encode(self.parts, batch)

        # forward process: a time for each sample, and the picture at that time
        u = objectives.unit_time(w.density, batch["u"], w.density_mean, w.density_std)
        t = self.schedule.time_from_unit(u)
        alpha, sigma = (level.to(x0.dtype).view(-1, 1, 1, 1) for level in self.schedule.level_at(t))
        shown = eps + w.input_perturbation * batch["perturbation"] if w.input_perturbation > 0 else eps
        x = (alpha * x0 + sigma * shown).contiguous(memory_format=torch.channels_last)

        # prediction
        output = predict(self.unet, x, t, condition).to(x0.dtype)

        # weighted squared error
        error = (output - objectives.target(self.prediction, x0, eps, alpha, sigma)).square()
        losses = mean_of_each(error) * batch.get("weight", torch.ones(()))
        return losses * objectives.loss_weight(w.weighting, self.prediction, alpha, sigma, w.gamma).flatten()

    def _latents(self, batch: Batch) -> Tensor:
        if "latents" in batch:
            return batch["latents"]
        mean, std = self.encode(batch["pixels"])
        return mean + std * batch["posterior"]


class TextToImageTask:
    """Trains a U-Net, and a text encoder where one is built anew, on the latents of a finished autoencoder."""

    def __init__(self, config: Config, pictures: list[Picture], device: torch.device, quiet: bool = False) -> None:
        self.config = config
        self.model = _assemble(config, pictures)
        _refuse_dropout(self.model, "model." if config.model.base is None else f"{config.model.base}/")
        for network in self.model.networks.values():
            network.to(device).eval()
        self.model.unet.to(memory_format=torch.channels_last).train()
        teacher = None if config.loss.distill is None else frozen_copy(self.model.unet)
        _choose_trained(self.model, config)
        if not config.train.compile:  # the compiler fuses group norm by itself
            speed_up_group_norm(self.model.unet)
        if config.train.gradient_checkpointing:
            self.model.unet.enable_gradient_checkpointing()
        self.module: nn.Module = (
            DenoisingLoss(self.model, config.loss)
            if config.loss.distill is None
            else DistillationLoss(self.model, teacher, config.loss.distill)
        )
        self.network: nn.Module = self.model.unet
        self.encodings = Encodings(self.model, Path(config.output) / "cache", quiet) if config.data.cache else None
        self.pictures = pictures
        self._check_captions(pictures)
        self.factor = networks.spatial_factor(self.model.vae)
        cells = self.factor * 2 ** (len(self.model.unet.config.block_out_channels) - 1)
        if config.data.buckets and config.data.bucket_step % cells:
            raise ValueError(f"data.bucket_step {config.data.bucket_step} is not a multiple of this model's {cells}")
        self._check_recipe()

    @cached_property
    def dataset(self) -> LatentSet:
        """Encodes pictures and captions when it is first asked for, where there is a cache and they are not in it."""
        return LatentSet(
            pictures=self.pictures,
            views=self._views,
            posteriors=self.encodings.latents(self._shown(self.pictures)) if self.encodings else None,
            latent_channels=self.model.vae.config.latent_channels,
            factor=self.factor,
            seed=self.config.seed,
            offset_noise=self.config.loss.offset_noise,
            input_perturbation=self.config.loss.input_perturbation,
            sizes=self.model.text_encoder_2 is not None,
            caption=self._caption,
            encode_text=self._text_encoding(),
        )

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for network in self.model.networks.values() for parameter in network.parameters()]

    def example(self, count: int) -> Batch:
        data, channels = self.config.data, self.model.vae.config.latent_channels
        width, height = max(bucket_shapes(data), key=lambda s: s[0] * s[1]) if data.buckets else (data.size, data.size)
        latents = torch.zeros(count, channels, height // self.factor, width // self.factor)
        shown = {"latents": latents} if self.encodings else {"pixels": torch.zeros(count, 3, height, width)}
        extra = dict.fromkeys(("noise", "posterior", "perturbation"), latents)
        sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32).expand(count, -1)
        return shown | extra | {"u": torch.full((count,), 0.5), "sizes": sizes, **self._tokens([""] * count)}

    def refuses(self, picture: Picture) -> str | None:
        trigger = self.config.data.captions.trigger
        long = [caption for caption in (lead(trigger, text) for text in picture.texts) if not self._fits(caption)]
        return f"longer than the {self.model.tokenizer.model_max_length - 2} tokens read: {long[0]!r}" if long else None

    def cache_note(self) -> str:
        return self.encodings.note(self._shown(self.pictures), self._captions()) if self.encodings else "none"

    def probe(self, pictures: list[Picture]) -> LatentSet:
        self._check_captions(pictures)
        return dataclasses.replace(
            self.dataset,
            pictures=pictures,
            posteriors=self.encodings.latents(self._shown(pictures)) if self.encodings else None,
            seed=probe_seed(self.config.seed),
            in_bins=True,
            caption=lambda picture, _: self._plain(picture),
            encode_text=self._tokens,
        )

    def gathered(self) -> "TextToImageTask | None":
        found = {name: networks.unsharded(network) for name, network in self.model.networks.items()}
        if any(network is None for network in found.values()):
            return None
        whole = copy.copy(self)
        whole.model = dataclasses.replace(self.model, **found)
        return whole

    def save(self, path: Path, dtype: torch.dtype | None = None) -> None:
        m = self.config.model
        if m.lora is not None or m.words:
            adapters.save(self.model, path, str(m.base), kohya=m.lora is not None and m.lora.kohya)
        else:
            folder.save_model(self._with_preview(), path, dtype)

    def _with_preview(self) -> Model:
        """The model, whose recipe says how its latents look without decoding them."""
        if self.model.recipe.latent_rgb is not None:
            return self.model
        some = self.pictures[:: max(1, len(self.pictures) // PREVIEWED)][:PREVIEWED]
        view = View(width=self.config.data.size, height=self.config.data.size, background=self.config.data.background)
        pixels = np.stack([picture.pixels(view) for picture in some])
        recipe = dataclasses.replace(self.model.recipe, latent_rgb=previews.fit(self.model.vae, to_tensor(pixels)))
        return dataclasses.replace(self.model, recipe=recipe)

    def samples(self) -> list[Image.Image]:
        self.module.eval()
        images = TextToImage(self.model)(self._prompts(), seed=0, literal=True)
        self.module.train()
        return images

    def _prompts(self) -> list[str]:
        """What the samples show: what the recipe says, or a few captions."""
        if self.config.recipe.prompts:
            return self.config.recipe.prompts
        return [self._plain(picture) for picture in self.pictures[:: -(-len(self.pictures) // 16)]]

    def _check_recipe(self) -> None:
        """What would only be found wrong when the samples are drawn, after all the training."""
        try:
            TextToImage(self.model).run(Settings(prompts=tuple(self._prompts()), seed=0, literal=True))
        except ValueError as error:
            raise ValueError(f"recipe: {error}") from None

    # --- captions

    def _plain(self, picture: Picture) -> str:
        """The caption of a picture without any choice."""
        return picture.text if picture.plain else lead(self.config.data.captions.trigger, picture.text)

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
        long = [(picture.file, reason) for picture in pictures if (reason := self.refuses(picture)) is not None]
        if long:
            raise ValueError(f"captions of {len(long)} pictures do not fit, first {long[0][0]}: {long[0][1]}")

    def _fits(self, caption: str) -> bool:
        return all(text.fits(tokenizer, caption) for tokenizer in self.model.tokenizers)

    def _captions(self) -> list[str]:
        """All captions that can occur, where a frozen encoder reads them and they can be counted; else none."""
        c = self.config.data.captions
        learning = any(p.requires_grad for encoder in self.model.text_encoders for p in encoder.parameters())
        if learning or c.keywords > 0 or c.fillers or c.shuffle_tags:
            return []
        found = (caption for picture in self.pictures for caption in variants(picture, c.templates, c.trigger))
        return [caption for caption in dict.fromkeys(found) if self._fits(caption)]

    def _text_encoding(self) -> Callable[[list[str]], Batch]:
        captions = self._captions() if self.encodings else []
        return self.encodings.captions(captions) if self.encodings and captions else self._tokens

    def _tokens(self, captions: list[str]) -> Batch:
        return text.tokenize(self.model, captions)

    # --- pictures

    def _shown(self, pictures: list[Picture]) -> list[tuple[Picture, View]]:
        return [(picture, view) for picture in pictures for view in self._views(picture)]

    def _views(self, picture: Picture) -> list[View]:
        data = self.config.data
        width, height = nearest(picture.sides, bucket_shapes(data)) if data.buckets else (data.size, data.size)
        places = [(2 * k + 1) / (2 * data.crops) for k in range(data.crops)]
        return [
            View(width=width, height=height, background=data.background, place=place, flip=flip)
            for flip in ((False, True) if data.flip else (False,))
            for place in places
        ]


def _choose_trained(model: Model, config: Config) -> None:
    """Freeze everything but what the config trains: adapters, learnt words, or whole networks."""
    m = config.model
    for network in model.networks.values():
        network.requires_grad_(False)
    if m.lora is not None:
        alpha = float(m.lora.rank) if m.lora.alpha is None else m.lora.alpha
        lora.add(model.unet, lora.TARGETS[m.lora.targets], m.lora.rank, alpha, m.lora.dora)
        for encoder in model.text_encoders if m.lora.text_encoder else ():
            lora.add(encoder, lora.TEXT_TARGETS, m.lora.rank, alpha, m.lora.dora)
    for tokenizer, encoder in zip(model.tokenizers, model.text_encoders, strict=True) if m.words else ():
        words, vectors = {w.word: w.start for w in m.words}, {w.word: w.vectors for w in m.words}
        embeddings.add(tokenizer, encoder, words, vectors)
    if m.lora is None and not m.words:
        model.unet.requires_grad_(True)
        for encoder in model.text_encoders:
            encoder.requires_grad_(m.text_encoder is not None or m.train_text_encoder)
    for layer in text.idle_layers(model):  # processes would wait for gradients that never come
        layer.requires_grad_(False)


def _refuse_dropout(model: Model, where: str) -> None:
    """ValueError if a network would draw from a random state, which a run that goes on has not got."""
    for name, network in model.networks.items():
        for argument in ("dropout", "attention_dropout"):
            if (share := getattr(network.config, argument, 0.0)) > 0:
                raise ValueError(
                    f"{where}{name}: {argument} {share:g} draws what a run that goes on cannot draw again: set it to 0"
                )


def _assemble(config: Config, pictures: list[Picture]) -> Model:
    """The parts that the config describes are built, the others are read from ``model.base``."""
    m = config.model
    if (m.lora is not None or m.words) and m.base is None:
        raise ValueError("model.lora and model.words are put on a finished model: name it in model.base")
    if m.base is not None:
        new = [name for name in ("autoencoder", "tokenizer", "text_encoder", "unet") if getattr(m, name) is not None]
        if new:
            raise ValueError(f"model.base brings its own model.{new[0]}: give one or the other")
        plain = type(m)()
        for name in ("beta_schedule", "zero_terminal_snr", "prediction"):
            if getattr(m, name) != getattr(plain, name):
                raise ValueError(f"model.base brings its own model.{name}: it cannot be changed, leave it out")
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
    if "guidance_scale" in said:  # the base's interval goes with the base's scale
        said.setdefault("guidance_interval", None)
    many = f"{len(pictures)} pictures of " if pictures[0].content is None else ""  # shards are not counted
    trained_on = f"{many}{config.data.path}" + (f", after {base.trained_on}" * bool(base.trained_on))
    return dataclasses.replace(
        base, **({"prompts": []} | said), width=config.data.size, height=config.data.size, trained_on=trained_on
    )


def bucket_shapes(data: Data) -> list[tuple[int, int]]:
    """The shapes of a run with buckets."""
    return shapes(data.size, data.bucket_step, data.bucket_ratio)
