"""The safety checker of Stable Diffusion as a checker of ours: it says which pictures it flags, and blackens none."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from diffusion.models.stock import bare_packages, no_bar
from diffusion.places import title_of

with bare_packages():
    from diffusers.pipelines.stable_diffusion import safety_checker

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class StockChecker:
    """Compares what CLIP sees in a picture with fixed concepts, on the CPU in float32."""

    net: Any
    process: CLIPImageProcessorPil
    path: Path

    def __call__(self, images: "list[Image.Image]") -> list[str | None]:
        pixels = self.process(images=images, return_tensors="pt").pixel_values
        painted = [torch.zeros(1) for _ in images]  # what it makes black, in place of pictures
        _, flagged = self.net(clip_input=pixels, images=painted)
        name = title_of(self.path.parent)  # it goes into the picture, and where a folder lies is nobody's business
        return [f"the safety checker of {name} takes it for unsafe" if one else None for one in flagged]

    def __str__(self) -> str:
        return str(self.path)


def load_checker(path: Path) -> StockChecker:
    """A stock ``StableDiffusionSafetyChecker`` folder. ValueError if it is none."""
    logging.getLogger(safety_checker.__name__).setLevel(logging.ERROR)  # it warns of a black picture: here is none
    try:
        with no_bar():
            net, read = safety_checker.StableDiffusionSafetyChecker.from_pretrained(
                path, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} cannot be read as a safety checker ({str(error).splitlines()[0]})") from None
    if read["missing_keys"]:
        raise ValueError(f"{path} is not a safety checker: its weights have no {min(read['missing_keys'])}")
    side = net.config.vision_config.image_size
    process = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return StockChecker(net.float().eval(), process, path)
