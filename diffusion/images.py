"""Pictures on disk: names that never collide, writes that are whole or absent, metadata that travels with the pixels.

An output is a file, a folder or a template. Only a file that was named letter by letter is ever overwritten; a folder
or a template gets the next free name. ``Image.info`` carries three texts, which every saved picture carries too:
``parameters``, in the AUTOMATIC1111 format that other tools read, ``diffusion``, the JSON object that makes the same
picture again, and an XMP packet that marks the picture as generated.
"""

import io
import json
import os
import re
import string
import tempfile
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from PIL import Image
from PIL.PngImagePlugin import PngImageFile, PngInfo

from diffusion import __version__
from diffusion.parameters import format_parameters

DEFAULT_FOLDER = "outputs"
DEFAULT_NAME = "{index:05d}-{seed}-{slug}.png"
FIELDS = ("index", "seed", "slug")
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
TEXTS = ("parameters", "diffusion")
XMP = "XML:com.adobe.xmp"  # the keyword of a packet in PNG, and its name in ``Image.info``
STAGED = ".diffusion-"  # what the name of a file that is still being written begins with
MAX_NAME_BYTES = 255  # of one path component, on every file system in common use
SLUG_BYTES = 80
EXIF_IFD, USER_COMMENT, IMAGE_DESCRIPTION, MAKE, MODEL = 0x8769, 0x9286, 0x010E, 0x010F, 0x0110
# IPTC's words for where a picture comes from (Photo Metadata Standard, Digital Source Type): drawn, or drawn from one
GENERATED, COMPOSITE = "trainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia"
PACKET = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about=""
    xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
    xmp:CreatorTool="diffusion {version}"
    Iptc4xmpExt:DigitalSourceType="http://cv.iptc.org/newscodes/digitalsourcetype/{source}"/>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="r"?>"""


class Output(NamedTuple):
    """Where pictures go: a format string over FIELDS; ``named`` when it is one file that the user named exactly."""

    template: str
    named: bool


def parse_output(output: str | os.PathLike[str] | None = None) -> Output:
    """Read a file, a folder (existing, with a trailing slash, or without an extension) or a template as an Output.

    ``None`` is the folder ``outputs``. Raises ValueError for an unknown template field or picture format.
    """
    text = DEFAULT_FOLDER + "/" if output is None else os.fspath(output)
    if not text or "\0" in text:
        raise ValueError(f"output {text!r} is not a path: name a file, a folder or a template")
    if os.path.isdir(text):
        return Output(f"{_escape(text.rstrip('/'))}/{DEFAULT_NAME}", named=False)
    if os.path.isfile(text):
        text = _escape(text)
    fields, suffix = _template_fields(text), Path(text).suffix
    if text.endswith("/") or not suffix:
        return Output(f"{text.rstrip('/')}/{DEFAULT_NAME}", named=False)
    if suffix.lower() not in FORMATS:
        raise ValueError(f"output {text!r} must end in one of {', '.join(FORMATS)}, or be a folder ending in '/'")
    return Output(text, named=not fields)


def check_output(output: Output, count: int, seed: int, slug: str, what: str = "output") -> None:
    """Fail before any work is spent: raises ValueError when ``count`` pictures cannot be written there.

    A file is created and removed in the folder, or where the folder would be made: permission bits alone do not tell
    of read-only mounts.
    """
    path = render(output, index=1, seed=seed, slug=slug)
    if output.named and count > 1:
        raise ValueError(
            f"{what} {path} names one file, but {count} pictures were asked for: "
            f"give a folder, or a template such as {path.stem}-{{index}}{path.suffix}"
        )
    if len(os.fsencode(path.name)) > MAX_NAME_BYTES:
        raise ValueError(
            f"the name of {what}, {path.name[:40]}..., is longer than {MAX_NAME_BYTES} bytes: give a shorter one"
        )
    if path.is_dir():
        raise ValueError(f"{what} {path} is a folder: end it in '/' to put pictures into it")
    try:
        nearest = next(folder for folder in path.parents if folder.exists())
        with tempfile.NamedTemporaryFile(dir=nearest, prefix=STAGED):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(f"{what}: {path.parent} is not writable ({reason}): choose another place") from None


def render(output: Output, *, index: int, seed: int, slug: str) -> Path:
    """The path that the template gives for one picture, whether or not it exists."""
    return Path(output.template.format(index=index, seed=seed, slug=slug))


def slugify(prompt: str, limit: int = SLUG_BYTES) -> str:
    """A prompt as part of a file name: lower-case words of any script joined by ``-``, up to ``limit`` UTF-8 bytes."""
    prompt = re.sub(r"<lora:[^<>]*>", "", prompt)
    words = re.findall(r"[^\W_]+", unicodedata.normalize("NFC", prompt).lower())
    text = "-".join(words).encode("utf-8", "ignore")[:limit].decode("utf-8", "ignore")
    return text.rstrip("-") or "picture"


def save_image(
    image: Image.Image,
    output: Output | str | os.PathLike[str] | None = None,
    *,
    seed: int = 0,
    slug: str = "picture",
    metadata: bool = True,
) -> Path:
    """Write one picture, with the texts of its ``info`` unless ``metadata`` is false, and return where it went.

    The file appears whole or not at all. Names that are taken are passed over, but for a file named exactly.
    """
    output = output if isinstance(output, Output) else parse_output(output)
    path = render(output, index=next_index(output, seed=seed, slug=slug), seed=seed, slug=slug)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _staged(path.parent) as (stream, staged):
        encode(image, stream, FORMATS[path.suffix.lower()], texts_of(image) if metadata else {})
        _settle(stream)
        if output.named:
            os.replace(staged, path)
            return path
        return _place(staged, output, seed, slug)


def is_black(image: Image.Image) -> bool:
    """Whether nothing is in it: a failure, and not a picture."""
    return image.getbbox() is None


def refuse_black(seeds: Sequence[int]) -> None:
    """FloatingPointError for the pictures of these seeds, if there are any, in which nothing is."""
    if seeds:
        raise FloatingPointError(f"the picture of seed {', '.join(map(str, seeds))} came out black and was not saved")


@contextmanager
def atomic(path: Path) -> Iterator[IO[bytes]]:
    """A stream whose bytes become the file when the block ends well; a file that was there is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _staged(path.parent) as (stream, staged):
        yield stream
        _settle(stream)
        os.replace(staged, path)


@contextmanager
def _staged(folder: Path) -> Iterator[tuple[IO[bytes], Path]]:
    handle, name = tempfile.mkstemp(dir=folder, prefix=STAGED)
    try:
        with os.fdopen(handle, "wb") as stream:
            os.chmod(name, 0o666 & ~_umask())
            yield stream, Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def _settle(stream: IO[bytes]) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def next_index(output: Output, *, seed: int, slug: str) -> int:
    """One more than the highest index that the folder holds, so that a removed picture's number is not given again."""
    folder, pattern = render(output, index=1, seed=seed, slug=slug).parent, _index_pattern(output)
    if pattern is None or not folder.is_dir():
        return 1
    names = [name for name in os.listdir(folder) if not name.startswith(STAGED)]
    taken = [int(match[1]) for name in names if (match := pattern.match(name))]
    return max(taken, default=0) + 1


def texts_of(image: Image.Image) -> dict[str, str]:
    """The metadata texts that a picture carries, as far as it has them."""
    return {key: image.info[key] for key in (*TEXTS, XMP) if isinstance(image.info.get(key), str)}


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a picture says about itself: ``{"parameters": text, "diffusion": dict}``, either absent where it has none.

    Raises ValueError when the file is no PNG, JPEG or WebP picture.
    """
    texts, _ = read_texts(path)
    found: dict[str, Any] = {key: texts[key] for key in TEXTS if key in texts}
    try:
        found["diffusion"] = json.loads(texts["diffusion"])
    except (KeyError, ValueError, RecursionError):
        found.pop("diffusion", None)  # another program's text under our key is not ours to read
    return found


def read_texts(path: str | os.PathLike[str]) -> tuple[dict[str, str], tuple[int, int]]:
    """All texts that a picture carries, whoever wrote them, and its width and height. ValueError for no picture."""
    try:
        with Image.open(path, formats=sorted(set(FORMATS.values()))) as image:
            if not isinstance(image, PngImageFile):
                return _exif_texts(image), image.size
            # what is behind the pixels, where some programs write, is found by reading them
            kept: Mapping[Any, Any] = image.info if TEXTS[0] in image.info else image.text
            return {key: text for key, text in kept.items() if isinstance(text, str)}, image.size
    except FileNotFoundError:
        raise ValueError(f"{path} is not there") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: cannot be read as a picture ({error})") from None


def metadata_texts(made: Mapping[str, Any]) -> dict[str, str]:
    """The texts of a picture from the one mapping that says how it was made (see ``pipeline``)."""
    record = json.dumps(made, ensure_ascii=True, allow_nan=False)
    return {"parameters": format_parameters(made), "diffusion": record} | mark(composite="init_image" in made)


def mark(*, composite: bool) -> dict[str, str]:
    """The text that says of a picture that it was generated, all of it or, ``composite``, from another picture."""
    return {XMP: PACKET.format(version=__version__, source=COMPOSITE if composite else GENERATED)}


def sheet_texts(images: Sequence[Image.Image], **call: Any) -> dict[str, str]:
    """The texts of a sheet: what all of its pictures have in common, and what else is known of their call.

    If any of them is a composite, or flagged, so is the sheet.
    """
    each = [json.loads(image.info["diffusion"]) for image in images if "diffusion" in image.info]
    if not each:
        return {}
    common = {name: value for name, value in each[0].items() if all(name in o and o[name] == value for o in each)}
    reasons = dict.fromkeys(one["flagged"] for one in each if "flagged" in one)
    common |= {"flagged": "; ".join(reasons)} if reasons else {}
    texts = metadata_texts(common | {name: value for name, value in call.items() if value is not None})
    return texts | mark(composite=any("init_image" in one for one in each))


def _template_fields(text: str) -> list[str]:
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(text) if field is not None]
        strange = [field for field in fields if field not in FIELDS]
        if not strange:
            text.format(index=1, seed=1, slug="a")  # a wrong format specification shows here
    except ValueError as error:
        raise ValueError(f"output template {text!r}: {error}; write {{{{ for a plain brace") from None
    if strange:
        known = ", ".join(f"{{{field}}}" for field in FIELDS)
        raise ValueError(f"output template {text!r}: unknown field {{{strange[0]}}}; the fields are {known}")
    return fields


def _index_pattern(output: Output) -> re.Pattern[str] | None:
    """What a file name of this template begins with, up to its index; None where the name holds no index."""
    pattern = ""
    for text, field, _, _ in string.Formatter().parse(Path(output.template).name):
        pattern += re.escape(text)
        if field == "index":
            return re.compile(pattern + r"(\d+)")
        pattern += {"seed": r"\d+", "slug": r".*?"}.get(field or "", "")
    return None


def _escape(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def _place(staged: Path, output: Output, seed: int, slug: str) -> Path:
    """Give the staged file the first free name. A hard link fails where a rename would overwrite."""
    counts = "index" in _template_fields(output.template)
    index, copy = next_index(output, seed=seed, slug=slug), 1
    while True:
        path = render(output, index=index, seed=seed, slug=slug)
        path.parent.mkdir(parents=True, exist_ok=True)
        if copy > 1:
            path = path.with_name(f"{path.stem}-{copy}{path.suffix}")
        try:
            os.link(staged, path)
            return path
        except FileExistsError:  # taken, perhaps by another process since we looked
            index, copy = (index + 1, copy) if counts else (index, copy + 1)
        except OSError:  # a file system without hard links
            path.open("xb").close()
            os.replace(staged, path)
            return path


def encode(image: Image.Image, stream: Any, format: str, texts: Mapping[str, str], **options: Any) -> None:
    """Write a picture, or with Pillow's ``options`` an animation, with its texts, where its format has them.

    A GIF has a comment: of the texts it carries ``parameters``, and the XMP.
    """
    if format == "GIF":
        written = io.BytesIO()
        image.save(written, format, comment=texts.get("parameters", ""), **options)
        stream.write(_with_xmp(written.getvalue(), texts[XMP]) if XMP in texts else written.getvalue())
        return
    if format == "PNG":
        info = PngInfo()
        for key, text in texts.items():
            add = info.add_itxt if key == XMP else info.add_text
            add(key, text)
        image.save(stream, format, pnginfo=info, **options)
        return
    exif = Image.Exif()
    if "parameters" in texts:  # EXIF 2.3: an 8-byte character code, then the text
        exif.get_ifd(EXIF_IFD)[USER_COMMENT] = b"UNICODE\0" + texts["parameters"].encode("utf-16-be")
    if "diffusion" in texts:
        exif[IMAGE_DESCRIPTION] = texts["diffusion"]
    image.convert("RGB").save(stream, format, quality=95, exif=exif, xmp=texts.get(XMP, "").encode(), **options)


def _with_xmp(gif: bytes, packet: str) -> bytes:
    """A GIF with an XMP packet, which Pillow does not write (XMP specification part 3, 1.1.2).

    It is an extension behind the header and the colour table. The packet is not in blocks: whoever reads it as such is
    led to its end from wherever a block of it ends, by bytes that count down.
    """
    table = 3 << (gif[10] & 7) + 1 if gif[10] & 0x80 else 0
    trailer = bytes([1, *range(255, -1, -1), 0])
    return gif[: 13 + table] + b"\x21\xff\x0bXMP DataXMP" + packet.encode() + trailer + gif[13 + table :]


def _exif_texts(image: Image.Image) -> dict[str, str]:
    """The texts of a JPEG or WebP: ours, and ``key:text`` where ComfyUI puts it."""
    exif = image.getexif()
    comment, description = exif.get_ifd(EXIF_IFD).get(USER_COMMENT), exif.get(IMAGE_DESCRIPTION)
    texts = {}
    for tag in (MAKE, MODEL):
        key, colon, text = str(exif.get(tag, "")).partition(":")
        if colon and text.startswith("{"):
            texts[key] = text
    if isinstance(comment, bytes):
        texts["parameters"] = _user_comment(comment)
    if isinstance(description, str):
        texts["diffusion"] = description
    return {key: text for key, text in texts.items() if text}


def _user_comment(comment: bytes) -> str:
    """EXIF 2.3: a character code of 8 bytes, then the text; of UTF-16 programs write either order of bytes."""
    code, text = comment[:8], comment[8:]
    if code != b"UNICODE\0":
        return text.decode("utf-8", "replace").strip("\0 ") if code == b"ASCII\0\0\0" else ""
    order = "be" if text[::2].count(0) >= text[1::2].count(0) else "le"
    return text.decode(f"utf-16-{order}", "replace").strip("\0")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
