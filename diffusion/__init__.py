"""A text-to-image diffusion toolkit: ``TextToImage.load("emoji")("a red apple")``. Importing it loads nothing."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusion.pipeline import TextToImage as TextToImage

__version__ = "0.1.0"
__all__ = ["TextToImage", "__version__"]


def __getattr__(name: str) -> Any:
    """Import the pipeline, and torch with it, when it is first asked for."""
    if name == "TextToImage":
        from diffusion.pipeline import TextToImage

        return TextToImage
    raise AttributeError(f"module 'diffusion' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
