"""One call as the networks see it: prompts read, noise and pictures to begin from, and the steps of every batch."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from diffusion import canvas, prompts, rng
from diffusion.canvas import Canvas
from diffusion.guidance import classifier_free_guidance, keep_known
from diffusion.loading import hash_files, weight_files
from diffusion.models import adapters, previews, text
from diffusion.models.denoiser import network_denoiser
from diffusion.models.folder import Model
from diffusion.models.networks import decode, to_latents, to_pixels, wrapped_edges
from diffusion.places import find_lora
from diffusion.samplers import SAMPLERS, Denoise, initial_scale, rotate, seed_noise
from diffusion.schedules import Level, levels, levels_of
from diffusion.settings import Settings, Shot

Condition = dict[str, Tensor]


class Reached(NamedTuple):
    """Where a batch is after a step."""

    done: int  # steps, of both descents
    x: Tensor  # (B, C, h, w), at the noise level reached
    denoised: Tensor


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
    board: Canvas | None  # the picture to begin from
    grids: Sequence[Sequence[Level]]  # the noise levels of each descent: one, and with ``hires`` a second one
    control: Any  # a ControlNetModel, or None
    lora_folder: Path

    @classmethod
    def plan(cls, model: Model, full: Settings, control: Any, lora_folder: Path) -> "Drawing":
        """Read everything that a request names. ValueError for what is not there, or does not fit."""
        words = read_words(model, full)
        text.check_layers(model.text_encoders, full.clip_skip)
        board = canvas.make_canvas(full, model.factor)
        grids = _grids(model, full)
        found = cls(
            model=model, full=full, words=words, board=board, grids=grids, control=control, lora_folder=lora_folder
        )
        for shot in full.shots():
            adapters.check(model, found.loras(shot))
        if model.compiled is not None and (full.tile or control or any(map(found.loras, full.shots()))):
            raise ValueError("a compiled U-Net is what it is: leave out compile, or tile, control and <lora:...>")
        return found

    def loras(self, shot: Shot) -> tuple[tuple[Path, float], ...]:
        """What a picture's prompt asks to be put on the model for it."""
        tags = self.words.prompts[shot.prompt].loras
        return tuple((find_lora(name, self.lora_folder), strength) for name, strength in tags)

    def lora_facts(self, shot: Shot) -> list[dict[str, Any]]:
        """Name, weight and hash of everything that is on the model for a picture."""
        put_on = [*((Path(path), strength) for path, strength in self.model.adapters.items()), *self.loras(shot)]
        return [{"name": p.stem, "weight": w, "hash": hash_files(weight_files(p))} for p, w in put_on]

    def batches(self) -> Iterator[list[Shot]]:
        """Shots that go through the network together: their prompts are as long, and ask for the same LoRAs."""
        size = self.full.batch_size
        assert size is not None, "filled() gives the batch size"
        for _, group in groupby(self.full.shots(), lambda shot: (self.loras(shot), self.words.chunks(shot))):
            alike = list(group)
            yield from (alike[start : start + size] for start in range(0, len(alike), size))

    @torch.inference_mode()
    def steps(self, shots: Sequence[Shot]) -> Iterator[Reached]:
        """Draw a batch. FloatingPointError when the network puts out numbers that are not finite."""
        networks, done, latents = (self.model.unet, self.model.vae), 0, None
        with adapters.lent(self.model, self.loras(shots[0])), wrapped_edges(networks, self.full.tile):
            for number, grid in enumerate(self.grids):
                x, denoise = self._begin(shots, grid, latents)
                noise = partial(_fresh_noise, shots, "sampler" if number == 0 else "sampler.hires", x)
                for step in SAMPLERS[str(self.full.sampler)](denoise, x, grid, noise):
                    done, latents = done + 1, step.x
                    if not torch.isfinite(step.x).all():
                        raise FloatingPointError(
                            f"the network put out numbers that are not finite at step {done}: try --dtype fp32"
                        )
                    yield Reached(done, step.x, step.denoised)

    def pictures(self, latents: Tensor) -> list[Image.Image]:
        """The finished pictures of a batch; only while its last step is held."""
        images = decode(self.model.vae, latents)
        return images if self.board is None or self.full.hires is not None else [*map(self.board.finish, images)]

    # --- where a descent begins

    def _begin(self, shots: Sequence[Shot], grid: Sequence[Level], before: Tensor | None) -> tuple[Tensor, Denoise]:
        """x at the first level, and the denoiser that goes down from there."""
        known, mask = self._known(before)
        assert self.full.width is not None and self.full.height is not None  # noqa: PT018 - filled() gave them
        width, height = self.full.width, self.full.height
        if known is not None:
            height, width = (side * self.model.factor for side in known.shape[2:])
        noise = self._first_noise(shots, height, width)
        denoise = self._denoiser(shots, height, width)
        if known is None:
            return noise * initial_scale(grid[0]), denoise
        x = grid[0].alpha * known + grid[0].sigma * noise
        return x, denoise if mask is None else keep_known(denoise, known, mask)

    def _known(self, before: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Latents to begin from, of the canvas or of what was drawn so far, enlarged; and where they are drawn anew."""
        factor = self.model.factor
        if before is not None:
            images = decode(self.model.vae, before)
            sides = [round(side * (self.full.hires or 1) / factor) * factor for side in images[0].size]
            large = [image.resize((sides[0], sides[1]), Image.Resampling.LANCZOS) for image in images]
            return self._encode(large), None
        if self.board is None:
            return None, None
        known, cells = self._encode([Image.fromarray(self.board.pixels)]), self.board.cells(factor)
        return known, None if cells is None else torch.from_numpy(cells).to(known)[None, None]

    def _encode(self, images: Sequence[Image.Image]) -> Tensor:
        """The mean of the posterior of each picture, ``(B, C, h, w)``, on the scale that the U-Net sees."""
        return torch.cat([to_latents(self.model.vae, to_pixels([image]))[0] for image in images])

    def _first_noise(self, shots: Sequence[Shot], height: int, width: int) -> Tensor:
        """The noise of each shot's seed, or on the arc from there to another seed's."""
        cells = height // self.model.factor, width // self.model.factor
        shape = (self.model.unet.config.in_channels, *cells)
        drawn = []
        for shot in shots:
            noise = seed_noise(shot.seed, shape)
            drawn.append(noise if shot.to_seed is None else rotate(noise, seed_noise(shot.to_seed, shape), shot.share))
        return torch.stack(drawn).to(self.model.unet.device)

    # --- what it goes down by

    def _denoiser(self, shots: Sequence[Shot], height: int, width: int) -> Denoise:
        """The network under the prompts, guided away from the negative prompt."""
        full, chunks = self.full, self.words.chunks(shots[0])
        wordings = [shot._replace(seed=0, to_seed=None) for shot in shots]
        known = {wording: self._condition(wording, chunks) for wording in dict.fromkeys(wordings)}
        wanted = _stacked([known[wording] for wording in wordings])
        unwanted = _stacked([self._condition(Shot(full.negative_prompt, 0), chunks)] * len(shots))
        if "pooled" in wanted:  # SDXL is told the size that its picture is to look like, and where it is cut: nowhere
            sizes = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32).expand(len(shots), -1)
            wanted["sizes"] = unwanted["sizes"] = sizes
        make = partial(network_denoiser, self._network(height, width), self.model.schedule, self.model.prediction)
        assert full.guidance_scale is not None, "filled() gave it"
        if full.guidance_scale == 1:
            return make(wanted)
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

    def _network(self, height: int, width: int) -> Any:
        """The U-Net, or the U-Net as a ControlNet leads it."""
        if self.control is None or self.full.control_image is None:
            return self.model.unet if self.model.compiled is None else self.model.compiled
        from diffusion.models.control import Controlled  # slow to import

        picture = canvas.fit(canvas.read(self.full.control_image), (width, height))
        return Controlled(self.model.unet, self.control, (to_pixels([picture]) + 1) / 2, self.full.control_scale)


def preview(model: Model, latents: Tensor, *, exact: bool = False) -> list[Image.Image]:
    """What latents ``(B, C, h, w)`` look like: by the linear map of the recipe, by one that is fitted, or decoded."""
    if exact:
        return decode(model.vae, latents)
    if model.recipe.latent_rgb is None:
        model.recipe.latent_rgb = previews.fit(model.vae)
    return previews.draw(latents, model.recipe.latent_rgb, model.factor)


def _grids(model: Model, full: Settings) -> list[list[Level]]:
    strengths = [1.0 if full.strength is None else full.strength] + [full.hires_strength] * (full.hires is not None)
    if full.sigmas is None:
        assert full.steps is not None and full.schedule is not None  # noqa: PT018 - filled() gave them
        return [levels(model.schedule, full.steps, full.schedule, strength) for strength in strengths]
    if full.hires is not None:
        raise ValueError("sigmas are the levels of one descent, and hires has two: leave one of them out")
    return [levels_of(model.schedule, full.sigmas)]


def _fresh_noise(shots: Sequence[Shot], purpose: str, like: Tensor, step: int, draw: int) -> Tensor:
    """What stochastic samplers add: a function of the seed of a picture and the step, whatever the batch."""
    drawn = [rng.normal(shot.seed, purpose, step, draw, shape=like.shape[1:]) for shot in shots]
    return torch.stack([torch.from_numpy(values) for values in drawn]).to(like)


def _stacked(conditions: Sequence[Condition]) -> Condition:
    return {name: torch.cat([one[name] for one in conditions]) for name in conditions[0]}
