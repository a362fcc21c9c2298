"""From prompts to pictures: ``TextToImage.load("emoji")("a red apple", seed=7)``."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffusion import __version__, rng
from diffusion.guidance import classifier_free_guidance
from diffusion.images import metadata_texts
from diffusion.models import text
from diffusion.models.denoiser import network_denoiser
from diffusion.models.folder import Model, load_model, stock_pipeline
from diffusion.models.networks import decode, spatial_factor
from diffusion.samplers import SAMPLERS, Denoise, initial_scale
from diffusion.schedules import levels
from diffusion.settings import Limits, Settings, base_of, check_device, find_model, resolve_dtype


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One denoising step of one batch."""

    index: int  # 1 .. total
    total: int
    pictures: Sequence[tuple[str, int]]  # (prompt, seed) of each picture in the batch
    latents: Tensor  # (B, C, h, w), at the noise level reached
    denoised: Tensor  # the estimate of the clean latents made on the way
    images: list[Image.Image] | None  # at the last step of a batch, its pictures
    _vae: Any

    @property
    def seeds(self) -> list[int]:
        """The seed of each picture in the batch."""
        return [seed for _, seed in self.pictures]

    def preview(self) -> list[Image.Image]:
        """What the pictures look like so far: the estimate, decoded."""
        return decode(self._vae, self.denoised)


@dataclass
class TextToImage:
    """A loaded model that draws. Picture k of each prompt has the seed ``seed + k`` and depends on nothing else."""

    model: Model

    @classmethod
    def load(
        cls,
        path: str | Path = "emoji",
        device: str | None = None,
        dtype: str | torch.dtype | None = None,
        loras: Mapping[str, float] | None = None,
    ) -> "TextToImage":
        """Load a model folder, or one of the shipped models by name; ``loras`` are put on it, each so strongly.

        ``device`` None or "auto" takes the fastest one present; ``dtype`` None takes bfloat16 on CUDA and float32
        elsewhere. Raises ValueError for a folder that is no model, for a LoRA that does not fit it, and for a device
        or dtype this machine lacks.
        """
        where = choose_device(device)
        model = load_model(find_model(path), where, choose_dtype(dtype, where))
        for lora, strength in (loras or {}).items():
            from diffusion.models import adapters

            adapters.apply(model, lora, strength)
        return cls(model)

    def __call__(self, prompt: str | Sequence[str], **settings: Any) -> list[Image.Image]:
        """Draw. Takes the fields of ``Settings`` as keywords; each one left out is the model's own default.

        Returns one RGB picture for each prompt and each of ``num_images``, prompt by prompt; ``Image.info`` says how
        it was made. Raises ValueError for a request that cannot be met and FloatingPointError when the network puts
        out numbers that are not finite.
        """
        batches = (step.images for step in self.stream(prompt, **settings) if step.images is not None)
        return [image for images in batches for image in images]

    def stream(self, prompt: str | Sequence[str], **settings: Any) -> Iterator[Progress]:
        """The same, step by step. To stop early is to stop iterating."""
        wanted = Settings(prompts=(prompt,) if isinstance(prompt, str) else tuple(prompt), **settings)
        return self.run(wanted)

    def run(self, wanted: Settings) -> Iterator[Progress]:
        """The steps of a checked request."""
        full = self.resolved(wanted)
        pictures = full.pictures()
        text.tokenize(self.model, [*dict.fromkeys(full.prompts), full.negative_prompt])  # too long: say so now
        assert full.batch_size is not None, "filled() gives the batch size"
        batches = [pictures[start : start + full.batch_size] for start in range(0, len(pictures), full.batch_size)]
        return (step for batch in batches for step in self._batch(batch, full))

    def resolved(self, wanted: Settings) -> Settings:
        """The request with every default answered by this model, and checked against it."""
        full = wanted.filled(self.model.recipe)
        full.check(Limits(spatial_factor(self.model.vae), self.model.schedule.num_timesteps))
        return full

    def first_noise(self, seeds: Sequence[int], height: int, width: int) -> Tensor:
        """Standard normal ``(B, C, h, w)``: for each seed what the stock library draws for it on the CPU."""
        factor = spatial_factor(self.model.vae)
        shape = (1, self.model.unet.config.in_channels, height // factor, width // factor)
        return torch.cat([torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)) for seed in seeds])

    def to_diffusers(self) -> Any:
        """The stock ``StableDiffusionPipeline`` over these weights, with DDIM on our ``trailing`` grid."""
        return stock_pipeline(self.model)

    # --- how

    @torch.inference_mode()
    def _batch(self, pictures: Sequence[tuple[str, int]], full: Settings) -> Iterator[Progress]:
        unet, schedule = self.model.unet, self.model.schedule
        assert full.height is not None and full.width is not None and full.steps is not None  # noqa: PT018
        assert full.sampler is not None and full.schedule is not None  # noqa: PT018 - filled() gave them all
        seeds = [seed for _, seed in pictures]
        grid = levels(schedule, full.steps, full.schedule)
        x = self.first_noise(seeds, full.height, full.width).to(unet.device) * initial_scale(grid[0])

        def noise(step: int, draw: int) -> Tensor:
            drawn = [rng.normal(seed, "sampler", step, draw, shape=x.shape[1:]) for seed in seeds]
            return torch.stack([torch.from_numpy(values) for values in drawn]).to(x)

        denoise = self._denoiser([prompt for prompt, _ in pictures], full)
        for step in SAMPLERS[full.sampler](denoise, x, grid, noise):
            if not torch.isfinite(step.x).all():
                raise FloatingPointError(
                    f"the network put out numbers that are not finite at step {step.index + 1}: try --dtype fp32"
                )
            last = step.index + 1 == full.steps
            yield Progress(
                index=step.index + 1,
                total=full.steps,
                pictures=pictures,
                latents=step.x,
                denoised=step.denoised,
                images=self._finished(step.x, pictures, full) if last else None,
                _vae=self.model.vae,
            )

    def _denoiser(self, prompts: list[str], full: Settings) -> Denoise:
        """The network under these prompts, guided away from the negative prompt."""
        unet, schedule, prediction = self.model.unet, self.model.schedule, self.model.prediction
        make = partial(network_denoiser, unet, schedule, prediction)
        wanted = self._condition(prompts, full)
        assert full.guidance_scale is not None
        if full.guidance_scale == 1:
            return make(wanted)
        unwanted = self._condition([full.negative_prompt] * len(prompts), full)
        both = {name: torch.cat([unwanted[name], wanted[name]]) for name in wanted}
        return classifier_free_guidance(make(both), make(wanted), full.guidance_scale)

    def _condition(self, prompts: Sequence[str], full: Settings) -> dict[str, Tensor]:
        """One prompt at a time: a batch of another size may round otherwise, and a picture must not know its batch."""
        unique = {
            prompt: text.encode(self.model, text.tokenize(self.model, [prompt])) for prompt in dict.fromkeys(prompts)
        }
        found = {name: torch.cat([unique[prompt][name] for prompt in prompts]) for name in unique[prompts[0]]}
        if "pooled" in found:  # SDXL is told the size that its picture is to look like, and where it is cut: nowhere
            sizes = torch.tensor([full.height, full.width, 0, 0, full.height, full.width], dtype=torch.float32)
            found["sizes"] = sizes.expand(len(prompts), -1)
        return found

    def _finished(self, latents: Tensor, pictures: Sequence[tuple[str, int]], full: Settings) -> list[Image.Image]:
        images = decode(self.model.vae, latents)
        for image, (prompt, seed) in zip(images, pictures, strict=True):
            image.info.update(metadata_texts(self._made(prompt, seed, full)))
        return images

    def _made(self, prompt: str, seed: int, full: Settings) -> dict[str, Any]:
        """Everything needed to make the same picture again."""
        return {
            "prompt": prompt,
            "negative_prompt": full.negative_prompt,
            "seed": seed,
            "steps": full.steps,
            "guidance_scale": full.guidance_scale,
            "sampler": full.sampler,
            "schedule": full.schedule,
            "width": full.width,
            "height": full.height,
            "model": self.model.path.name if self.model.path else "unsaved",
            "model_hash": self.model_hash,
            **({"loras": self._loras} if self._loras else {}),
            "dtype": str(self.model.unet.dtype).removeprefix("torch."),
            "device": self.model.unet.device.type,
            "version": __version__,
            "torch": torch.__version__,
        }

    @cached_property
    def _loras(self) -> list[dict[str, Any]]:
        """Name, weight and hash of what was put on the model."""
        return [
            {"name": Path(path).stem, "weight": strength, "hash": _hash(_weight_files(Path(path)))}
            for path, strength in self.model.adapters.items()
        ]

    @cached_property
    def model_hash(self) -> str:
        """Ten hexadecimal digits of the SHA-256 of the folder's weight files, or of the U-Net where it has none."""
        files = _weight_files(self.model.path) if self.model.path else []
        if files:
            return _hash(files)
        digest = hashlib.sha256()
        for weight in self.model.unet.state_dict().values():
            digest.update(weight.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:10]


def _weight_files(path: Path) -> list[Path]:
    """Those of a model folder, of a folder of adapters with its base, or the one file."""
    if path.is_file():
        return [path]
    base = base_of(path)
    return sorted([*path.glob("*.safetensors"), *path.glob("*/*.safetensors"), *(_weight_files(base) if base else [])])


def _hash(files: Sequence[Path]) -> str:
    """Ten hexadecimal digits of the SHA-256 of files, one after the other."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:10]


def choose_device(name: str | None = None) -> torch.device:
    """The named device, or the fastest one present for None and "auto"; ValueError for one this machine lacks."""
    check_device(name)
    present = [kind for kind in ("cuda", "xpu", "mps") if getattr(torch, kind).is_available()] + ["cpu"]
    if name is None or name == "auto":
        return torch.device(present[0])
    if torch.device(name).type not in present:
        raise ValueError(f"device {name!r} is not present on this machine: it has {', '.join(present)}")
    return torch.device(name)


def choose_dtype(name: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The named dtype; by default bfloat16 on a GPU that has it, and float32 elsewhere."""
    if isinstance(name, torch.dtype):
        return name
    found = resolve_dtype(name, device.type)
    if found is not None:
        return getattr(torch, found)
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
