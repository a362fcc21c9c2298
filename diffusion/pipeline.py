"""From prompts to pictures: ``TextToImage.load("emoji")("a red apple", seed=7)``."""

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from inspect import GEN_RUNNING, getgeneratorstate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from diffusion import __version__
from diffusion.comparison import listed, variants
from diffusion.images import metadata_texts, sheet_texts
from diffusion.names import resolve_prediction
from diffusion.notices import Flagged, tell
from diffusion.places import LORAS, Limits, title_of
from diffusion.safety import Checker, flags
from diffusion.samplers import seed_noise
from diffusion.settings import Settings, Shot
from diffusion.sheets import make_table

if TYPE_CHECKING:  # the libraries of the networks take seconds to import: not before a model is loaded
    from diffusion.drawing import Drawing
    from diffusion.models.control import Control
    from diffusion.models.folder import Model
    from diffusion.repair import Batch, Repairs


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One denoising step of one batch. A batch that failed, and is drawn again in another way, begins at 1 again."""

    index: int  # 1 .. total
    total: int
    pictures: Sequence[Shot]  # prompt, seed and more of each picture in the batch
    latents: Tensor  # (B, C, h, w), at the noise level reached
    denoised: Tensor  # the estimate of the clean latents made on the way
    size: tuple[int, int]  # width and height of the pictures so far, which latents may exceed to the right and below
    images: list[Image.Image] | None  # at the last step of a batch, its pictures
    _repairs: "Repairs"

    @property
    def seeds(self) -> list[int]:
        """The seed of each picture in the batch."""
        return [shot.seed for shot in self.pictures]

    def preview(self, *, exact: bool = False) -> list[Image.Image]:
        """What the pictures look like so far: a linear function of the estimated latents, or the estimate decoded."""
        from diffusion.canvas import cut

        return [cut(image, self.size) for image in self._repairs.preview(self.denoised, exact=exact)]


@dataclass
class TextToImage:
    """A loaded model that draws. Picture k of each prompt has the seed ``seed + k`` and depends on nothing else.

    One call or stream at a time, for what a prompt puts on the model (``<lora:...>``) is on it until the last step: a
    new one ends the one before it.
    """

    model: "Model"
    control: "Control | None" = None
    lora_folder: Path = LORAS  # where <lora:name> looks
    prediction: str | None = None  # what its network puts out, where that was said
    device: torch.device | None = None  # where a model without weights would draw
    checker: Checker | None = None  # what looks at finished pictures (see ``safety``)
    _running: Generator[Progress] | None = field(default=None, init=False, repr=False, compare=False)

    @classmethod
    def load(
        cls,
        path: str | Path = "emoji",
        device: str | None = None,
        dtype: str | torch.dtype | None = None,
        loras: Mapping[str, float] | Mapping[Path, float] | None = None,
        *,
        control: str | Path | None = None,
        lora_folder: str | Path | None = None,
        prediction: str | None = None,
        compile: bool = False,
        offload: bool = False,
        offline: bool = False,
        checker: Checker | None = None,
        weights: bool = True,
    ) -> "TextToImage":
        """Load a model: a folder, the name of a shipped one, one ``.safetensors`` file, or a Hub id.

        A Hub id is looked for in the local cache first, and with ``offline`` nowhere else. ``loras`` are put on the
        model, each so strongly; ``lora_folder`` (``loras``) is where ``<lora:name>`` looks; ``control`` is a
        ControlNet's folder; ``prediction`` is for a model that does not say what its network puts out; ``compile``
        compiles the U-Net, which pays after minutes of drawing, and computes a small model too in what the device is
        fast at; ``offload`` keeps on a GPU only the network that is at work. ``device`` None or "auto" takes the
        fastest one present, ``dtype`` None what that is fast at. Without ``weights`` it draws nothing, but in a moment
        it makes the ``plan`` of a request, and refuses what drawing would. ``checker`` looks at finished pictures (see
        ``safety``): of one that it flags, ``info["flagged"]`` and a ``Flagged`` warning say why. Raises ValueError for
        what is no model, for a LoRA or ControlNet that does not fit it, and for a device or dtype this machine lacks.
        """
        from diffusion import interop, loading
        from diffusion.models import adapters

        prediction, folder = resolve_prediction(prediction), _lora_folder(lora_folder)
        where = loading.choose_device(device)
        found = loading.locate(path, offline=offline)
        least = loading.SMALL if compile else 0  # who compiles asks for speed, of a small model too
        count = max(least, loading.count_weights(found)) if weights else 0
        kind = loading.choose_dtype(_name_of(dtype), where, count)
        read = partial(loading.read_model, device=where, dtype=kind) if weights else interop.outline_model
        model = read(found, prediction=prediction)
        for network in model.networks.values() if not weights else ():
            torch.nn.Module.to(network, kind)  # the stock classes' own complains
        for lora, strength in (loras or {}).items():
            adapters.apply(model, lora, strength)
        if compile and weights:
            loading.compile_network(model)
        elif compile:
            model.compiled = model.unet
        led = _read_control(control, model, where, kind, weights)
        if offload:
            loading.offload(model, None if led is None else led.net, where)
        return cls(model, led, folder, prediction, where, checker)

    def __call__(self, prompt: str | Sequence[str] | Settings, **settings: Any) -> list[Image.Image]:
        """Draw prompts, or a request as ``Settings``, whose fields are the keywords; one left out is the model's own.

        Returns one RGB picture for each prompt and each of ``num_images``, prompt by prompt; ``Image.info`` says how
        it was made. Raises ValueError for a request that cannot be met. Numbers that are not finite, and memory that is
        short, are repaired as far as they can be, with a ``Repaired`` warning, and raise FloatingPointError (at the
        end, when all other pictures are drawn) and MemoryError only then.
        """
        batches = (step.images for step in self.stream(prompt, **settings) if step.images is not None)
        return [image for images in batches for image in images]

    def stream(self, prompt: str | Sequence[str] | Settings, **settings: Any) -> Generator[Progress]:
        """The same, step by step. To stop early is to stop iterating, and to drop or ``close()`` it."""
        if isinstance(prompt, Settings):
            return self.run(replace(prompt, **settings))
        return self.run(Settings(prompts=(prompt,) if isinstance(prompt, str) else tuple(prompt), **settings))

    def run(self, wanted: Settings) -> Generator[Progress]:
        """The steps of a checked request."""
        if self.model.device.type == "meta":
            raise ValueError("this model was loaded without its weights: it plans, and draws nothing")
        plan = self.plan(wanted)
        return self._alone(self._drawn(plan), plan.full.count)

    def plan(self, wanted: Settings) -> "Drawing":
        """All that a request means to this model, before the first step. ValueError for one that cannot be met."""
        from diffusion.drawing import Drawing

        plan = Drawing.plan(self.model, self.resolved(wanted), self.control, self.lora_folder)
        if plan.full.batch_size != "auto":
            return plan
        from diffusion.memory import largest_batch

        device = self.model.device if self.device is None else self.device
        most = largest_batch(self.model, plan.full, device, plan.chunks, self.control)
        return replace(plan, full=replace(plan.full, batch_size=most))

    def compare(self, prompt: str, axes: Mapping[str, Iterable[Any]], **settings: Any) -> Image.Image:
        """One labelled sheet of the same picture under each combination of the values of one or two fields.

        ``axes={"steps": [10, 20, 50], "guidance_scale": [3, 5]}``: the first field goes across, the second one down.
        """
        axes = {name: listed(name, values) for name, values in axes.items()}
        wanted, columns, rows = variants(Settings(prompts=(prompt,), **settings), axes)
        runs = [self.run(one) for one in wanted]  # all of them are checked before the first is drawn
        images = [step.images[0] for run in runs for step in run if step.images is not None]
        sheet = make_table(images, columns, rows)
        sheet.info.update(sheet_texts(images, compare=axes))
        return sheet

    def resolved(self, wanted: Settings) -> Settings:
        """The request with every default answered by this model, and checked against it."""
        full = wanted.filled(self.model.recipe)
        full.check(Limits(self.model.factor, self.model.schedule.num_timesteps))
        if self.control is None and full.control_image is not None:
            raise ValueError("control_image needs a ControlNet: give control, its folder")
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

    def _alone(self, steps: Generator[Progress], count: int) -> Generator[Progress]:
        """One that is followed no more may still be referred to, by a traceback, and hold what it has put on the model.

        So whoever begins ends it first. ValueError for one that is followed after all, before its last picture.
        """
        if self._running is not None and getgeneratorstate(self._running) == GEN_RUNNING:
            raise ValueError("this model is drawing at this moment: one call at a time")
        before, self._running = self._running, steps
        if before is not None:
            before.close()
        with closing(steps):
            for step in steps:
                yield step
                count -= len(step.images or ())
        if count:
            raise ValueError("another call of the same model has ended this stream: draw one after the other")

    def _drawn(self, drawing: "Drawing") -> Generator[Progress]:
        """Every batch; what fails in one is drawn again in another way, for as long as there is one."""
        from diffusion.repair import FAULTS, Batch, Repairs

        full, net = drawing.full, None if self.control is None else self.control.net
        how: dict[str, Any] = {"size": full.finished, "tile": full.vae_tiling, "whole": bool(full.tile)}
        with Repairs(model=self.model, control=net, **how) as repairs:
            left = deque(Batch(shots=shots) for shots in drawing.batches())
            while left:
                batch, *rest = left.popleft().parts(repairs.most)
                left.extendleft(reversed(rest))
                try:
                    with repairs.working(batch):
                        yield from self._batch(drawing, batch, repairs)
                except FAULTS as fault:
                    left.extendleft(reversed(repairs.again(batch, fault)))
            repairs.end()

    def _batch(self, drawing: "Drawing", batch: "Batch", repairs: "Repairs") -> Iterator[Progress]:
        total = drawing.full.total_steps
        with closing(drawing.steps(batch, repairs)) as steps:
            for reached in steps:
                yield Progress(
                    index=reached.done,
                    total=total,
                    pictures=batch.shots,
                    latents=reached.x,
                    denoised=reached.denoised,
                    size=reached.size,
                    images=self._finished(drawing, batch, reached.x, repairs) if reached.done == total else None,
                    _repairs=repairs,
                )

    def _finished(self, drawing: "Drawing", batch: "Batch", latents: Tensor, repairs: "Repairs") -> list[Image.Image]:
        images = drawing.pictures(batch, latents, repairs)
        reasons = [None] * len(images) if self.checker is None else flags(self.checker, images)
        for n, (image, shot, reason) in enumerate(zip(images, batch.shots, reasons, strict=True)):
            flagged = {} if reason is None else {"flagged": reason}
            made = self._made(replace(drawing.full, vae_tiling=batch.tiles[n]), drawing, shot, repairs.dtype)
            repaired = {"repairs": batch.said[n]} if batch.said[n] else {}
            image.info.update(metadata_texts(made | repaired | flagged) | flagged)
            if reason is not None:
                tell(Flagged(f"picture of seed {shot.seed} is flagged: {reason}"))
        return images

    def _made(self, full: Settings, drawing: "Drawing", shot: Shot, dtype: torch.dtype) -> dict[str, Any]:
        """Everything needed to make the same picture again."""
        return {
            **full.record(shot),
            "model": title_of(self.model.path) if self.model.path else "unsaved",
            "model_hash": self.model_hash,
            **({} if self.prediction is None else {"prediction": self.prediction}),
            **drawing.facts(shot),
            "dtype": str(dtype).removeprefix("torch."),
            "device": self.model.device.type,
            "version": __version__,
            "torch": torch.__version__,
        }


def _lora_folder(given: str | Path | None) -> Path:
    """Where ``<lora:name>`` looks. ValueError for a folder that was named and is not there."""
    if given is not None and not Path(given).is_dir():
        raise ValueError(f"{given} is no folder of LoRAs: there is no such folder")
    return LORAS if given is None else Path(given)


def _name_of(dtype: str | torch.dtype | None) -> str | None:
    """torch's own dtypes are held to what their names are."""
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype


def _read_control(
    path: str | Path | None, model: "Model", device: torch.device, dtype: torch.dtype, weights: bool
) -> "Control | None":
    """A ControlNet that belongs to the model. ValueError if it does not."""
    if path is None:
        return None
    from diffusion.loading import lay_out
    from diffusion.models.control import load_control, outline_control  # slow to import

    if not weights:
        control = outline_control(path, model)
        torch.nn.Module.to(control.net, dtype)  # the stock classes' own complains
        return control
    control = load_control(path, model, device, dtype)
    lay_out(control.net)
    return control
