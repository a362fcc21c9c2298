"""What can be trained: each task is a choice of trainable parameters and a loss, never another loop."""

import torch

from diffusion.data.source import Picture
from diffusion.schema import Config
from diffusion.tasks.autoencoder import AutoencoderTask
from diffusion.tasks.task import Task
from diffusion.tasks.text_to_image import TextToImageTask

__all__ = ["Task", "build"]


def build(config: Config, pictures: list[Picture], device: torch.device, quiet: bool = False) -> Task:
    """The task that the config names, with new weights drawn from the run's seed.

    ``pictures`` are those that are trained on, or a sample of them where they are read as a stream. With ``quiet``
    no bar is shown of what is encoded once.
    """
    torch.manual_seed(config.seed)
    if config.task == "autoencoder":
        return AutoencoderTask(config, pictures, device)
    return TextToImageTask(config, pictures, device, quiet)
