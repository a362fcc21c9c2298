"""One call as the networks see it: prompts read, noise and pictures to begin from, and the steps of every batch."""

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from diffusion import canvas, prompts, rng
from diffusion.canvas import Canvas
from diffusion.guidance import classifier_free_guidance, keep_known
from diffusion.models import adapters, text
from diffusion.models.denoiser import network_denoiser
from diffusion.models.folder import Model
from diffusion.models.networks import UNetNotFinite, to_pixels, wrapped_edges
from diffusion.places import find_lora, hash_files, weight_files
from diffusion.repair import Batch, Repairs
from diffusion.samplers import SAMPLERS, Denoise, initial_scale, rotate, seed_noise
from diffusion.schedules import Level, levels, levels_of
from diffusion.settings import Settings, Shot

if TYPE_CHECKING:
    from diffusion.models.control import Control

Condition = dict[str, Tensor]


class Reached(NamedTuple):
    """Where a batch is after a step."""

    done: int  # steps, of both descents
    x: Tensor  # (B, C, h, w), at the noise level reached
    denoised: Tensor
    size: tuple[int, int]  # (width, height) of its pictures, which latents may exceed to the right and below


@dataclass(frozen=True)
class Descent:
    """One way down from noise to pictures; with ``hires`` there is a second one, from what the first has drawn."""

    grid: Sequence[Level]
    size: tuple[int, int]  # (width, height) of its pictures
    purpose: str  # what the noise that is drawn on the way is for

    def sides(self, factor: int) -> tuple[int, int]:
        """Width and height of what the network draws: multiples of ``factor``, the pixels of a latent cell."""
        width, height = (-(-side // factor) * factor for side in self.size)
        return width, height


@dataclass(frozen=True)
class Words:
    """The prompts of a call, taken apart and read: all that can be wrong with them has been found."""

    prompts: Mapping[str, prompts.Prompt]
    tokens: Mapping[str, text.Tokens]
    negative: str

    def chunks(self, shot: Shot) -> int:
        """How many times the encoder is asked for a picture, the negative prompt having as many."""
        written = (shot.prompt, self.negative, *([] if shot.to_prompt is None else [shot.to_prompt]))
        return max(self.tokens[one].chunks for one in written)


def read_words(model: Model, full: Settings) -> Words:
    """Take all prompts of a call apart. ValueError for one that cannot be read whole."""
    take = prompts.literal if full.literal else prompts.parse
    others = [full.negative_prompt, *([] if full.to_prompt is None else [full.to_prompt])]
    parsed = {one: take(one) for one in dict.fromkeys((*full.prompts, *others))}
    tagged = [one for one in others if parsed[one].loras and one not in full.prompts]
    if tagged:
        raise ValueError(f"a LoRA belongs into the prompt that is drawn from, not into {tagged[0]!r}")
    tokens = {one: text.read(model, prompt, long=full.long_prompts) for one, prompt in parsed.items()}
    return Words(parsed, tokens, full.negative_prompt)


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A filled request, a model, and all that could be found out before the first step."""

    model: Model
    full: Settings
    words: Words
    descents: Sequence[Descent]
    board: Canvas | None  # the picture to begin from
    guide: Image.Image | None  # the picture that a ControlNet leads by
    control: "Control | None"
    lora_folder: Path

    @classmethod
    def plan(cls, model: Model, full: Settings, control: "Control | None", lora_folder: Path) -> "Drawing":
        """Read everything that a request names. ValueError for what is not there, or does not fit.

        Weights are not looked at: a model that has none is planned for like any other.
        """
        words = read_words(model, full)
        text.check_layers(model.text_encoders, full.clip_skip)
        found = cls(
            model=model,
            full=full,
            words=words,
            descents=_descents(model, full),
            board=canvas.make_canvas(full, model.factor),
            guide=None if full.control_image is None else canvas.read(full.control_image),
            control=control,
            lora_folder=lora_folder,
        )
        for shot in full.shots():
            adapters.check(model, found.loras(shot))
        if model.compiled is not None and (full.tile or control or any(map(found.loras, full.shots()))):
            raise ValueError("a compiled U-Net is what it is: leave out compile, or tile, control and <lora:...>")
        return found

    @property
    def chunks(self) -> int:
        """How many times the text encoder is asked for the longest prompt."""
        return max(map(self.words.chunks, self.full.shots()))

    def loras(self, shot: Shot) -> tuple[tuple[Path, float], ...]:
        """What a picture's prompt asks to be put on the model for it."""
        tags = self.words.prompts[shot.prompt].loras
        return tuple((find_lora(name, self.lora_folder), strength) for name, strength in tags)

    def facts(self, shot: Shot) -> dict[str, Any]:
        """Names, weights and hashes of what leads the model, or is on it, for a picture.

        What its prompt puts on the model is told apart, for the prompt will do so again.
        """
        put_on = [(Path(path), strength) for path, strength in self.model.adapters.items()]
        lists = {"loras": put_on, "prompt_loras": self.loras(shot)}
        found: dict[str, Any] = {
            name: [{"name": p.stem, "weight": w, "hash": _hash(p)} for p, w in loras] for name, loras in lists.items()
        }
        found |= {} if self.control is None else {"control": _named(self.control.path)}
        return {name: value for name, value in found.items() if value}

    def batches(self) -> Iterator[list[Shot]]:
        """Shots that go through the network together: their prompts are as long, and ask for the same LoRAs."""
        size = self.full.batch_size
        assert isinstance(size, int), "plan() gives the batch size"
        for _, group in groupby(self.full.shots(), lambda shot: (self.loras(shot), self.words.chunks(shot))):
            alike = list(group)
            yield from (alike[start : start + size] for start in range(0, len(alike), size))

    @torch.inference_mode()
    def steps(self, batch: Batch, repairs: Repairs) -> Generator[Reached]:
        """Draw a batch. UNetNotFinite when the network puts out numbers that are not finite."""
        shots, networks, done = batch.shots, (self.model.unet, self.model.vae), 0
        latents: Tensor | None = None
        with adapters.lent(self.model, self.loras(shots[0])), wrapped_edges(networks, self.full.tile):
            for descent in self.descents:
                x, denoise = self._begin(batch, descent, self._boards(batch, descent, latents, repairs), repairs)
                noise = partial(_fresh_noise, shots, descent.purpose, x)
                for step in SAMPLERS[str(self.full.sampler)](denoise, x, descent.grid, noise):
                    done, latents = done + 1, step.x
                    sound = torch.isfinite(step.x).flatten(1).all(dim=1)
                    if not sound.all():
                        fault = f"the U-Net put out numbers that are not finite at step {done}"
                        raise UNetNotFinite(fault, (~sound).tolist())
                    yield Reached(done, step.x, step.denoised, descent.size)

    def pictures(self, batch: Batch, latents: Tensor, repairs: Repairs) -> list[Image.Image]:
        """The finished pictures of a batch; only while its last step is held."""
        images = repairs.decode(latents, batch)
        if self.board is not None and len(self.descents) == 1:
            return [self.board.finish(image) for image in images]
        return [canvas.cut(image, self.descents[-1].size) for image in images]

    # --- where a descent begins

    def _begin(
        self, batch: Batch, descent: Descent, boards: Sequence[Canvas], repairs: Repairs
    ) -> tuple[Tensor, Denoise]:
        """x at the first level, and the denoiser that goes down from there; of no boards from noise alone."""
        shots, start = batch.shots, descent.grid[0]
        noise, denoise = self._first_noise(shots, descent), self._denoiser(shots, descent)
        if not boards:
            return noise * initial_scale(start), denoise
        known = repairs.encode([Image.fromarray(board.pixels) for board in boards], batch)
        x, cells = start.alpha * known + start.sigma * noise, boards[0].cells(self.model.factor)
        if cells is None:
            return x, denoise
        return x, keep_known(denoise, known, torch.from_numpy(cells).to(known)[None, None])

    def _boards(self, batch: Batch, descent: Descent, before: Tensor | None, repairs: Repairs) -> list[Canvas]:
        """The picture to begin from, or what was drawn before, each picture as large as this descent has it."""
        if before is None:
            return [] if self.board is None else [self.board]
        small = [canvas.cut(image, self.descents[0].size) for image in repairs.decode(before, batch)]
        large = [image.resize(descent.size, Image.Resampling.LANCZOS) for image in small]
        return [canvas.pad_to(image, self.model.factor) for image in large]

    def _first_noise(self, shots: Sequence[Shot], descent: Descent) -> Tensor:
        """The noise of each shot's seed, or on the arc from there to another seed's."""
        width, height = (side // self.model.factor for side in descent.sides(self.model.factor))
        shape = (self.model.unet.config.in_channels, height, width)
        drawn = [_on_the_way(shot, lambda seed: seed_noise(seed, shape)) for shot in shots]
        return torch.stack(drawn).to(self.model.device)

    # --- what it goes down by

    def _denoiser(self, shots: Sequence[Shot], descent: Descent) -> Denoise:
        """The network under the prompts, guided away from the negative prompt."""
        full, chunks = self.full, self.words.chunks(shots[0])
        wordings = [shot._replace(seed=0, to_seed=None) for shot in shots]
        known = {wording: self._condition(wording, chunks) for wording in dict.fromkeys(wordings)}
        wanted = _stacked([known[wording] for wording in wordings])
        if "pooled" in wanted:  # SDXL is told the size that its picture is to look like, and where it is cut: nowhere
            width, height = descent.sides(self.model.factor)
            sizes = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32)
            wanted["sizes"] = sizes.expand(len(shots), -1)
        make = partial(network_denoiser, self._network(descent), self.model.schedule, self.model.prediction)
        assert full.guidance_scale is not None, "filled() gave it"
        if full.guidance_scale == 1:
            return make(wanted)
        unwanted = wanted | _stacked([self._condition(Shot(full.negative_prompt, 0), chunks)] * len(shots))
        both = {name: torch.cat([unwanted[name], wanted[name]]) for name in wanted}
        low, high = full.guidance_interval or (0.0, None)
        interval = None if full.guidance_interval is None else (low, math.inf if high is None else high)
        return classifier_free_guidance(make(both), make(wanted), full.guidance_scale, full.guidance_rescale, interval)

    def _condition(self, shot: Shot, chunks: int) -> Condition:
        """Of one prompt: a batch of another size may round otherwise, and a picture must not know its batch."""
        encode = partial(text.condition, self.model, chunks=chunks, clip_skip=self.full.clip_skip)
        start = encode(self.words.tokens[shot.prompt])
        if shot.to_prompt is None:
            return start
        end = encode(self.words.tokens[shot.to_prompt])
        return {name: torch.lerp(start[name], end[name], shot.share) for name in start}

    def _network(self, descent: Descent) -> Any:
        """The U-Net, or the U-Net as a ControlNet leads it."""
        if self.control is None or self.guide is None:
            return self.model.unet
        from diffusion.models.control import Controlled  # slow to import

        board = canvas.pad_to(canvas.fit(self.guide, descent.size), self.model.factor)
        image, scale = (to_pixels([Image.fromarray(board.pixels)]) + 1) / 2, self.full.control_scale
        assert scale is not None, "filled() gave it"
        return Controlled(self.model.unet, self.control.net, image, scale)


def _descents(model: Model, full: Settings) -> list[Descent]:
    assert full.width is not None and full.height is not None and full.steps is not None  # noqa: PT018 - by filled()
    size, strength = (full.width, full.height), 1.0 if full.strength is None else full.strength
    if full.sigmas is not None:
        return [Descent(levels_of(model.schedule, full.sigmas), size, "sampler")]
    make = partial(levels, model.schedule, full.steps, str(full.schedule))
    found = [Descent(make(strength), size, "sampler")]
    if full.hires_strength is None:
        return found
    return [*found, Descent(make(full.hires_strength), full.finished, "sampler.hires")]


def _on_the_way(shot: Shot, noise: Callable[[int], Tensor]) -> Tensor:
    """The noise of a shot's seed, or on the arc from there to another seed's."""
    start = noise(shot.seed)
    return start if shot.to_seed is None else rotate(start, noise(shot.to_seed), shot.share)


def _fresh_noise(shots: Sequence[Shot], purpose: str, like: Tensor, step: int, draw: int) -> Tensor:
    """What stochastic samplers add: a function of the seeds of a picture and the step, whatever the batch."""

    def noise(seed: int) -> Tensor:
        return torch.from_numpy(rng.normal(seed, purpose, step, draw, shape=like.shape[1:]))

    return torch.stack([_on_the_way(shot, noise) for shot in shots]).to(like)


def _named(path: Path) -> dict[str, str]:
    return {"name": path.name, "hash": _hash(path)}


def _hash(path: Path) -> str:
    """Of the weights of a LoRA or ControlNet."""
    return hash_files(weight_files(path))


def _stacked(conditions: Sequence[Condition]) -> Condition:
    return {name: torch.cat([one[name] for one in conditions]) for name in conditions[0]}
