"""From prompts to pictures: ``TextToImage.load("emoji")("a red apple", seed=7)``."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from diffusion import __version__
from diffusion.images import metadata_texts
from diffusion.names import resolve_prediction
from diffusion.places import Limits
from diffusion.samplers import seed_noise
from diffusion.settings import Settings, Shot, variants
from diffusion.sheets import make_table

if TYPE_CHECKING:  # the libraries of the networks take seconds to import: not before a model is loaded
    from diffusion.drawing import Drawing
    from diffusion.models.folder import Model


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One denoising step of one batch."""

    index: int  # 1 .. total
    total: int
    pictures: Sequence[Shot]  # prompt, seed and more of each picture in the batch
    latents: Tensor  # (B, C, h, w), at the noise level reached
    denoised: Tensor  # the estimate of the clean latents made on the way
    images: list[Image.Image] | None  # at the last step of a batch, its pictures
    _of: "TextToImage"

    @property
    def seeds(self) -> list[int]:
        """The seed of each picture in the batch."""
        return [shot.seed for shot in self.pictures]

    def preview(self, *, exact: bool = False) -> list[Image.Image]:
        """What the pictures look like so far: a linear function of the estimated latents, or the estimate decoded."""
        from diffusion.drawing import preview

        return preview(self._of.model, self.denoised, exact=exact)


@dataclass
class TextToImage:
    """A loaded model that draws. Picture k of each prompt has the seed ``seed + k`` and depends on nothing else.

    One call or stream at a time: what a prompt puts on the model (``<lora:...>``) is on it until its last step.
    """

    model: "Model"
    control: Any = None  # a ControlNetModel
    lora_folder: Path = field(default_factory=lambda: Path("loras"))  # where <lora:name> looks

    @classmethod
    def load(
        cls,
        path: str | Path = "emoji",
        device: str | None = None,
        dtype: str | torch.dtype | None = None,
        loras: Mapping[str, float] | None = None,
        *,
        control: str | Path | None = None,
        lora_folder: str | Path = "loras",
        prediction: str | None = None,
        compile: bool = False,
        offline: bool = False,
    ) -> "TextToImage":
        """Load a model: a folder, the name of a shipped one, one ``.safetensors`` file, or a Hub id.

        A Hub id is looked for in the local cache first, and with ``offline`` nowhere else. ``loras`` are put on the
        model, each so strongly; ``control`` is a ControlNet's folder; ``prediction`` is for a file that does not say
        what its network puts out; ``compile`` compiles the U-Net, which pays after minutes of drawing. ``device`` None
        or "auto" takes the fastest one present, ``dtype`` None what that is fast at. Raises ValueError for what is no
        model, for a LoRA or ControlNet that does not fit it, and for a device or dtype this machine lacks.
        """
        from diffusion import loading
        from diffusion.models import adapters

        prediction = resolve_prediction(prediction)
        where = loading.choose_device(device)
        found = loading.locate(path, offline=offline)
        kind = loading.choose_dtype(dtype, where, loading.count_weights(found))
        model = loading.read_model(found, where, kind, prediction)
        for lora, strength in (loras or {}).items():
            adapters.apply(model, lora, strength)
        if compile:
            loading.compile_network(model)
        net = None if control is None else loading.read_control(control, model, where, kind)
        return cls(model, net, Path(lora_folder))

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
        from diffusion.drawing import Drawing

        full = self.resolved(wanted)
        drawing = Drawing.plan(self.model, full, self.control, self.lora_folder)
        return (step for shots in drawing.batches() for step in self._batch(drawing, shots))

    def compare(self, prompt: str, axes: Mapping[str, Sequence[Any]], **settings: Any) -> Image.Image:
        """One labelled sheet of the same picture under each combination of the values of one or two fields.

        ``axes={"steps": [10, 20, 50], "guidance_scale": [3, 5]}``: the first field goes across, the second one down.
        """
        wanted, columns, rows = variants(Settings(prompts=(prompt,), **settings), axes)
        images = [step.images[0] for one in wanted for step in self.run(one) if step.images is not None]
        return make_table(images, columns, rows)

    def resolved(self, wanted: Settings) -> Settings:
        """The request with every default answered by this model, and checked against it."""
        full = wanted.filled(self.model.recipe)
        full.check(Limits(self.model.factor, self.model.schedule.num_timesteps))
        if self.control is None and full.control_image is not None:
            raise ValueError("control_image needs a ControlNet: load one with control")
        if self.control is not None and full.control_image is None:
            raise ValueError("the ControlNet needs a picture to lead by: give control_image")
        return full

    def first_noise(self, seeds: Sequence[int], height: int, width: int) -> Tensor:
        """Standard normal ``(B, C, h, w)``: for each seed what the stock library draws for it on the CPU."""
        shape = (self.model.unet.config.in_channels, height // self.model.factor, width // self.model.factor)
        return torch.stack([seed_noise(seed, shape) for seed in seeds])

    def to_diffusers(self) -> Any:
        """The stock ``StableDiffusionPipeline`` over these weights, with DDIM on our ``trailing`` grid."""
        from diffusion.models.folder import stock_pipeline

        return stock_pipeline(self.model)

    @cached_property
    def model_hash(self) -> str:
        """Ten hexadecimal digits of the SHA-256 of the model's weights."""
        from diffusion.loading import hash_of

        return hash_of(self.model)

    # --- how

    def _batch(self, drawing: "Drawing", shots: Sequence[Shot]) -> Iterator[Progress]:
        total = drawing.full.total_steps
        for reached in drawing.steps(shots):
            yield Progress(
                index=reached.done,
                total=total,
                pictures=shots,
                latents=reached.x,
                denoised=reached.denoised,
                images=self._finished(drawing, shots, reached.x) if reached.done == total else None,
                _of=self,
            )

    def _finished(self, drawing: "Drawing", shots: Sequence[Shot], latents: Tensor) -> list[Image.Image]:
        images = drawing.pictures(latents)
        for image, shot in zip(images, shots, strict=True):
            image.info.update(metadata_texts(self._made(drawing, shot)))
        return images

    def _made(self, drawing: "Drawing", shot: Shot) -> dict[str, Any]:
        """Everything needed to make the same picture again."""
        loras = drawing.lora_facts(shot)
        return {
            **drawing.full.record(shot),
            "model": self.model.path.name if self.model.path else "unsaved",
            "model_hash": self.model_hash,
            **({"loras": loras} if loras else {}),
            "dtype": str(self.model.unet.dtype).removeprefix("torch."),
            "device": self.model.unet.device.type,
            "version": __version__,
            "torch": torch.__version__,
        }
