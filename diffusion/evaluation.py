"""How well a model draws what it was asked for: reconstruction, and retrieval among all pictures of the set.

A drawn picture counts as right when, of all pictures of the folder, the one that its prompt names is nearest (top 1) or
among the five nearest (top 5) by mean squared error on 32x32 area-averaged RGB.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from diffusion import rng
from diffusion.data.dataset import to_tensor
from diffusion.data.source import Picture, read_folder
from diffusion.pipeline import TextToImage

SIDE = 32


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt and the place, in the folder's list of pictures, of what it should draw."""

    prompt: str
    answer: int


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The pictures drawn for a set of questions, and how near each came: rank 0 is the nearest of all."""

    questions: Sequence[Question]
    images: Sequence[Image.Image]
    ranks: Sequence[int]

    def top(self, count: int) -> float:
        """Share of the questions whose answer is among the ``count`` nearest."""
        return float(np.mean([rank < count for rank in self.ranks]))


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What ``evaluate`` measures; shares are of 1, PSNR is in decibels."""

    reconstruction_psnr: float
    train: Answers
    held_out: Answers
    paraphrases: Answers | None

    def rows(self) -> list[tuple[str, int, str]]:
        """(figure, number of pictures, value) as they are printed."""
        sets = [("training captions", self.train), ("held-out compositions", self.held_out)]
        sets += [("paraphrases", self.paraphrases)] if self.paraphrases is not None else []
        held_out = (
            "autoencoder on held-out pictures, PSNR",
            len(self.held_out.ranks),
            f"{self.reconstruction_psnr:.1f} dB",
        )
        return [
            held_out,
            *((f"{name}, top {k}", len(a.ranks), f"{a.top(k):.2f}") for name, a in sets for k in (1, 5)),
        ]


def evaluate(
    model: TextToImage, data: Path, paraphrases: Path | None = None, count: int = 200, seed: int = 0,
    on_image: Callable[[], object] = lambda: None,
) -> Figures:  # fmt: skip
    """Measure a model on a folder with a ``held_out`` split. One picture a prompt, seeds ``seed``, ``seed + 1``, ...

    ``count`` training captions are drawn evenly over base names: each base at most once. Raises ValueError for a
    folder without the split, and for a paraphrase of a picture that is not there.
    """
    train, held_out = (read_folder(data, split, group="base") for split in ("train", "held_out"))
    pictures = [*train, *held_out]
    thumbnails = np.stack([thumbnail(Image.fromarray(p.pixels(model.model.recipe.width))) for p in pictures])

    def ask(questions: list[Question]) -> Answers:
        images = []
        for number, question in enumerate(questions):
            images += model(question.prompt, seed=seed + number, literal=True)
            on_image()
        ranks = [rank(thumbnail(image), thumbnails, q.answer) for image, q in zip(images, questions, strict=True)]
        return Answers(questions=questions, images=images, ranks=ranks)

    return Figures(
        reconstruction_psnr=reconstruction_psnr(model, held_out),
        train=ask(one_of_each_base(train, count, seed)),
        held_out=ask([Question(prompt=p.text, answer=len(train) + i) for i, p in enumerate(held_out)]),
        paraphrases=None if paraphrases is None else ask(read_paraphrases(paraphrases, pictures)),
    )


def one_of_each_base(pictures: Sequence[Picture], count: int, seed: int) -> list[Question]:
    """``count`` captions of different bases, evenly from all of them: first the bases are shuffled, then the tones."""
    bases: dict[str, list[int]] = {}
    for index, picture in enumerate(pictures):
        bases.setdefault(picture.group, []).append(index)
    groups = list(bases.values())
    chosen = [groups[i] for i in rng.permutation(seed, "evaluate.base", 0, len(groups))[:count]]
    tones = rng.uniform(seed, "evaluate.tone", np.arange(len(chosen)), size=1)[:, 0]
    picks = [members[int(tone * len(members))] for members, tone in zip(chosen, tones, strict=True)]
    return [Question(prompt=pictures[pick].text, answer=pick) for pick in picks]


def read_paraphrases(file: Path, pictures: Sequence[Picture]) -> list[Question]:
    """JSON lines with ``prompt`` and ``text``, the name of the picture that is meant."""
    places = {picture.text: index for index, picture in enumerate(pictures)}
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    unknown = [row["text"] for row in rows if row["text"] not in places]
    if unknown:
        raise ValueError(f"{file}: no picture is called {unknown[0]!r}")
    return [Question(prompt=row["prompt"], answer=places[row["text"]]) for row in rows]


def thumbnail(image: Image.Image) -> npt.NDArray[np.float32]:
    """32x32 area-averaged RGB, flat."""
    return np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float32).ravel()


def rank(drawn: npt.NDArray[np.float32], thumbnails: npt.NDArray[np.float32], answer: int) -> int:
    """How many pictures are strictly nearer to the drawn one than the answer is."""
    distances = np.square(thumbnails - drawn).mean(axis=1)
    return int((distances < distances[answer]).sum())


@torch.inference_mode()
def reconstruction_psnr(model: TextToImage, pictures: Sequence[Picture]) -> float:
    """Mean over pictures of the PSNR in dB of encoding and decoding, from the posterior's mean, rounded to 8 bits."""
    vae, size = model.model.vae, model.model.recipe.width
    values = []
    for picture in pictures:
        pixels = to_tensor(picture.pixels(size)[None]).to(vae.device, vae.dtype)
        decoded = vae.decode(vae.encode(pixels).latent_dist.mean).sample.float().clamp(-1, 1)
        error = ((decoded * 127.5).round() / 127.5 - pixels.float()).square().mean()
        values.append(10 * torch.log10(4 / error.clamp_min(1e-12)).item())
    return float(np.mean(values))
