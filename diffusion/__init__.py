"""A text-to-image diffusion toolkit: ``TextToImage.load("emoji")("a red apple")``. Importing it loads nothing."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusion.notices import Flagged as Flagged
    from diffusion.notices import Repaired as Repaired
    from diffusion.pipeline import TextToImage as TextToImage
    from diffusion.records import recall as recall
    from diffusion.settings import Settings as Settings

__version__ = "0.1.0"
HOMES = {  # name -> where it is; only the pipeline brings torch with it
    "Flagged": "notices",
    "Repaired": "notices",
    "Settings": "settings",
    "TextToImage": "pipeline",
    "recall": "records",
}
__all__ = ["Flagged", "Repaired", "Settings", "TextToImage", "__version__", "recall"]


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is first asked for."""
    if name not in HOMES:
        raise AttributeError(f"module 'diffusion' has no attribute {name!r}")
    return getattr(import_module(f"diffusion.{HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
