"""What the loop knows of a task, and what tasks have in common."""

from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from diffusion.data.dataset import Batch
from diffusion.data.source import Picture
from diffusion.rng import name_id


class Task(Protocol):
    """What the loop needs to know of a task."""

    module: nn.Module  # trained; module(batch) gives one loss a sample, shape (B,)
    network: nn.Module  # the part that takes the time, which may be compiled

    @property
    def dataset(self) -> Any:
        """Visits -> batch."""

    def parameters(self) -> list[nn.Parameter]:
        """All weights that have to be in memory, those that are not trained included."""

    def example(self, count: int) -> Batch:
        """A batch of ``count`` blank pictures in the largest shape that occurs, to measure time and memory with."""

    def refuses(self, picture: Picture) -> str | None:
        """Why a picture cannot be trained on, if it cannot."""

    def cache_note(self) -> str:
        """What is computed once before training, how large it is, and whether it is there."""

    def probe(self, pictures: list[Picture]) -> Any:
        """A dataset of other pictures that draws by another seed than training, without augmentation."""

    def gathered(self) -> "Task | None":
        """The task itself, or one with whole networks where they are sharded: on the first process, else None."""

    def save(self, path: Path, dtype: torch.dtype | None = None) -> None:
        """Write what was trained as a model folder."""

    def samples(self) -> list[Image.Image]:
        """Pictures that show how far it is, the same ones each time."""


def probe_seed(seed: int) -> int:
    """The seed of a probe's draws."""
    return name_id(f"probe {seed}")


def mean_of_each(error: Tensor) -> Tensor:
    """The mean over everything but the batch, shape ``(B,)``."""
    return error.flatten(1).mean(dim=1)
