"""A text-to-image diffusion toolkit: ``TextToImage.load("emoji")("a red apple")``. Importing it loads nothing."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusion.pipeline import TextToImage as TextToImage
    from diffusion.records import recall as recall

__version__ = "0.1.0"
__all__ = ["TextToImage", "__version__", "recall"]


def __getattr__(name: str) -> Any:
    """Import the pipeline, and torch with it, when it is first asked for; ``recall`` is not so heavy."""
    if name == "TextToImage":
        from diffusion.pipeline import TextToImage

        return TextToImage
    if name == "recall":
        from diffusion.records import recall

        return recall
    raise AttributeError(f"module 'diffusion' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
