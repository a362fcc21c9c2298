"""The stock networks, imported without the rest of their library and read without its bars.

``diffusers.models.autoencoders`` and its neighbours import every architecture that there is when any one is asked for:
two seconds, of which the one takes a tenth. While the classes below are imported, those packages are bare folders;
afterwards they are forgotten, and whoever imports one gets all of it, around these same classes.
"""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars
from transformers.models.clip.configuration_clip import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPTextModelWithProjection
from transformers.models.clip.tokenization_clip import CLIPTokenizer
from transformers.utils import logging

CROWDED = ("models", "models.autoencoders", "models.controlnets", "models.transformers", "models.unets", "hooks")


@contextmanager
def bare_packages() -> Iterator[None]:
    """Within the block, those of the stock library's packages that are not loaded yet have nothing but their files."""
    found = importlib.util.find_spec("diffusers")
    assert found is not None and found.submodule_search_locations, "it is a dependency"  # noqa: PT018
    put = {}
    for name in CROWDED:
        if f"diffusers.{name}" not in sys.modules:
            put[f"diffusers.{name}"] = package = ModuleType(f"diffusers.{name}")
            package.__path__ = [str(Path(found.submodule_search_locations[0], *name.split(".")))]
    sys.modules |= put
    try:
        yield
    finally:
        for name, package in put.items():
            if sys.modules.get(name) is package:
                del sys.modules[name]


@contextmanager
def no_advice() -> Iterator[None]:
    """Within the block transformers does not say what could be installed besides, for classes that nobody asks for."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@contextmanager
def no_bar() -> Iterator[None]:
    """Within the block transformers shows no bar of the weights that it reads; afterwards bars are as they were."""
    if not logging.is_progress_bar_enabled():
        yield
        return
    hub_has_none = are_progress_bars_disabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()  # and the Hub's with them
        if hub_has_none:
            disable_progress_bars()


with bare_packages():
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

__all__ = [
    "AutoencoderKL",
    "CLIPTextConfig",
    "CLIPTextModel",
    "CLIPTextModelWithProjection",
    "CLIPTokenizer",
    "UNet2DConditionModel",
    "bare_packages",
    "no_advice",
    "no_bar",
]
