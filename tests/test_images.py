"""Names that never collide, files that are whole or absent, and metadata that comes back as it was written."""

import struct
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from commands import Command
from diffusion import TextToImage, __version__, images, sheets
from diffusion.images import check_output, parse_output, read_metadata, save_image
from diffusion.parameters import format_parameters, parse_parameters

MADE = {
    "prompt": 'a "red", apple: 火\nsecond line',
    "negative_prompt": "boat, cat",
    "seed": 2**64 - 1,
    "steps": 20,
    "guidance_scale": 7.0,
    "sampler": "dpmpp_2m",
    "schedule": "karras",
    "width": 512,
    "height": 768,
    "model": "a, b: c",
    "model_hash": "0123456789",
    "version": "1",
}


def picture() -> Image.Image:
    image = Image.new("RGB", (8, 6), "red")
    image.info.update(images.metadata_texts(MADE))
    return image


@pytest.mark.parametrize("text", ["{", "[" * 100_000, f'{{"seed": {"9" * 5000}}}'])
def test_a_text_under_our_key_that_is_no_json_is_not_ours(tmp_path: Path, text: str) -> None:
    info = PngInfo()
    info.add_text("diffusion", text)
    Image.new("RGB", (8, 6)).save(tmp_path / "x.png", pnginfo=info)
    assert read_metadata(tmp_path / "x.png") == {}


@pytest.mark.parametrize("suffix", sorted(images.FORMATS))
def test_metadata_round_trip(tmp_path: Path, suffix: str) -> None:
    path = save_image(picture(), tmp_path / f"x{suffix}")
    found = read_metadata(path)
    assert found == {"parameters": format_parameters(MADE), "diffusion": MADE}
    assert read_metadata(save_image(picture(), tmp_path / f"y{suffix}", metadata=False)) == {}


def test_parameters_are_written_as_other_tools_read_them() -> None:
    text = format_parameters(MADE | {"prompt": "a cat", "model": "m"})
    assert text == (
        "a cat\nNegative prompt: boat, cat\n"
        "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 18446744073709551615, "
        "Size: 512x768, Model hash: 0123456789, Model: m, RNG: CPU, Version: diffusion 1"
    )
    assert "Negative prompt" not in format_parameters(MADE | {"negative_prompt": ""})


def test_parameters_are_taken_apart() -> None:
    found = parse_parameters(format_parameters(MADE))
    assert (found["prompt"], found["negative_prompt"]) == (MADE["prompt"], "boat, cat")
    assert (found["Model"], found["Seed"], found["Size"]) == ("a, b: c", str(2**64 - 1), "512x768")
    assert parse_parameters("only a prompt") == {"prompt": "only a prompt", "negative_prompt": ""}


def test_taken_names_are_passed_over_and_removed_ones_not_given_again(tmp_path: Path) -> None:
    names = [save_image(picture(), tmp_path, seed=1, slug="a").name for _ in range(3)]
    assert names == ["00001-1-a.png", "00002-1-a.png", "00003-1-a.png"]
    (tmp_path / names[1]).unlink()
    assert save_image(picture(), tmp_path, seed=2, slug="b").name == "00004-2-b.png"
    template = str(tmp_path / "{slug}.png")
    assert [save_image(picture(), template, slug="c").name for _ in range(2)] == ["c.png", "c-2.png"]


def test_a_file_that_is_being_written_has_no_number(tmp_path: Path) -> None:
    (tmp_path / ".diffusion-41x").touch()
    assert save_image(picture(), str(tmp_path / "{slug}-{index}.png"), slug="a").name == "a-1.png"


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "x.png"
    old.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(images, "encode", fail)
    with pytest.raises(OSError, match="disk full"):
        save_image(picture(), old)
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]
    assert old.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("prompt", "slug"),
    [
        ("A Red Apple!", "a-red-apple"),
        ("../../etc/passwd", "etc-passwd"),
        ("火 fire", "火-fire"),
        ("", "picture"),
        ("?/\\", "picture"),
    ],
)
def test_slugs(prompt: str, slug: str) -> None:
    assert images.slugify(prompt) == slug


def test_a_slug_is_short_in_bytes() -> None:
    assert len(images.slugify("火" * 500).encode()) <= images.SLUG_BYTES


def test_checking_an_output_makes_nothing(tmp_path: Path) -> None:
    check_output(parse_output(f"{tmp_path}/new/deep/"), count=3, seed=1, slug="a")
    assert list(tmp_path.iterdir()) == []


def test_a_grid_holds_every_picture() -> None:
    assert sheets.make_grid([picture()] * 5).size == (24, 12)
    assert sheets.make_grid([picture()] * 5, columns=2).size == (16, 18)
    with pytest.raises(ValueError, match="at least one"):
        sheets.make_grid([])


def test_what_is_no_picture_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("no")
    with pytest.raises(ValueError, match=r"x\.png: cannot be read as a picture"):
        read_metadata(tmp_path / "x.png")


# --- the mark of what was generated, read by nothing of ours

SOURCES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
DRAWN, FROM_A_PICTURE = f"{SOURCES}trainedAlgorithmicMedia", f"{SOURCES}compositeWithTrainedAlgorithmicMedia"


def packet_of(path: Path) -> bytes | None:
    """The XMP of a PNG, JPEG or WebP, from its bytes."""
    data = Path(path).read_bytes()
    if data[:4] == b"RIFF":  # fourcc, size, and a byte that makes the size even
        return next((body for kind, body in blocks(data, 12, "<4sI") if kind == b"XMP "), None)
    if data[:2] == b"\xff\xd8":
        return next((body for kind, body in segments(data) if kind == b"http://ns.adobe.com/xap/1.0/"), None)
    name = b"XML:com.adobe.xmp\0\0\0\0\0"  # iTXt: keyword, not compressed, no language, no translated keyword
    texts = [body for kind, body in blocks(data, 8, ">I4s") if kind == b"iTXt"]
    return next((body.removeprefix(name) for body in texts if body.startswith(name)), None)


def blocks(data: bytes, at: int, form: str):
    while at < len(data):
        head = struct.unpack_from(form, data, at)
        kind, size = head if form[1] == "4" else head[::-1]
        yield kind, data[at + 8 : at + 8 + size]
        at += 8 + size + (size % 2 if form[1] == "4" else 4)


def segments(data: bytes):
    at = 2
    while data[at] == 0xFF and data[at + 1] != 0xDA:
        (size,) = struct.unpack_from(">H", data, at + 2)
        yield data[at + 4 : at + 2 + size].split(b"\0", 1) if b"\0" in data[at + 4 : at + 2 + size] else (b"", b"")
        at += 2 + size


def source_of(path: Path) -> str | None:
    """Where a picture says that it comes from; None where it says nothing."""
    packet = packet_of(path)
    if packet is None:
        return None
    assert packet.startswith(b'<?xpacket begin="\xef\xbb\xbf" id="W5M0MpCehiHzreSzNTczkc9d"?>')
    assert packet.endswith(b'<?xpacket end="r"?>')
    (facts,) = ElementTree.fromstring(packet).iter("{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description")
    assert facts.get("{http://ns.adobe.com/xap/1.0/}CreatorTool") == f"diffusion {__version__}"
    return facts.get("{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType")


def composite() -> Image.Image:
    image = picture()
    image.info.update(images.metadata_texts(MADE | {"init_image": {"name": "a.png", "sha256": "0"}}))
    return image


@pytest.mark.parametrize("suffix", sorted(images.FORMATS))
def test_what_is_drawn_is_marked_as_drawn(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    assert source_of(save_image(picture(), path)) == DRAWN
    assert source_of(save_image(composite(), path)) == FROM_A_PICTURE
    assert source_of(save_image(composite(), path, metadata=False)) is None
    assert source_of(save_image(Image.new("RGB", (8, 6)), path)) is None, "what nobody drew"
    assert source_of(sheets.save_film([picture(), composite()], path)) == FROM_A_PICTURE


def test_the_mark_outlives_another_save(tmp_path: Path) -> None:
    save_image(composite(), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as opened:
        assert source_of(save_image(opened, tmp_path / "b.webp")) == FROM_A_PICTURE
    plain = Image.new("RGB", (8, 6))
    plain.info[images.XMP] = "<x/>"  # of another program, in nothing but ASCII
    assert packet_of(save_image(plain, tmp_path / "c.png")) == b"<x/>"


def test_a_sheet_is_a_composite_if_any_of_its_pictures_is() -> None:
    assert images.sheet_texts([picture(), picture()])[images.XMP] == picture().info[images.XMP]
    mixed = images.sheet_texts([picture(), composite()])
    assert mixed[images.XMP] == composite().info[images.XMP]
    assert "init_image" not in mixed["diffusion"], "which they do not have in common"


def test_a_gif_has_the_parameters_for_a_comment(tmp_path: Path) -> None:
    sheets.save_film([Image.new("RGB", (8, 6)), picture()], tmp_path / "x.gif")
    with Image.open(tmp_path / "x.gif") as film:
        assert film.info["comment"].decode() == format_parameters(MADE)
        assert film.n_frames == 2


def test_a_gif_is_marked_and_every_reader_of_blocks_finds_its_frames(tmp_path: Path) -> None:
    """The packet is no blocks; lengths are read from it all the same, whatever they are."""
    for text in ("", "x" * 97, "ÿ" * 300):
        film = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue", "green")]
        film[-1].info |= {"parameters": "a cat", images.XMP: images.mark(composite=False)[images.XMP] + text}
        sheets.save_film(film, tmp_path / "x.gif")
        content = (tmp_path / "x.gif").read_bytes()
        start = content.index(b"\x21\xff\x0bXMP DataXMP") + 14
        assert content[start:].startswith(film[-1].info[images.XMP].encode() + b"\x01\xff\xfe")
        with Image.open(tmp_path / "x.gif") as opened:
            assert opened.info["comment"] == b"a cat"
            assert [opened.seek(n) or opened.convert("RGB").getpixel((0, 0)) for n in range(opened.n_frames)] == [
                (255, 0, 0),
                (0, 0, 255),
                (0, 128, 0),
            ]


def test_all_that_a_call_writes_is_marked(draw: Command) -> None:
    words = ("red apple", "--steps", "2", "--seed", "1")
    one = draw(*words, "-o", "a.png", "--preview", "p.png", "--grid", "g.jpg", "--film", "f.webp")
    assert [source_of(path) for path in (*one.paths, Path("p.png"))] == [DRAWN] * 4
    assert [source_of(path) for path in draw(*words, "-o", "c.png", "--compare", "cfg=1,2").paths] == [DRAWN]
    more = ("--init-image", "a.png", "--preview", "p.png")
    two = draw(*words, *more, "-o", "b.webp", "--grid", "g.png", "--film", "f.png")
    assert [source_of(path) for path in (*two.paths, Path("p.png"))] == [FROM_A_PICTURE] * 4
    assert read_metadata("b.webp")["diffusion"]["init_image"]["name"] == "a.png"
    bare = draw(*words, *more, "-o", "b.png", "--grid", "g.png", "--film", "f.png", "--no-metadata")
    assert [source_of(path) for path in (*bare.paths, Path("p.png"))] == [None] * 4


def test_an_animation_says_how_it_was_made_unless_it_is_not_to(draw: Command) -> None:
    words = ("red apple", "--to-prompt", "blue boat", "--frames", "2", "--steps", "1", "-s", "1", "-o", "way.gif")
    assert draw(*words).code == 0
    with Image.open("way.gif") as film:
        found = parse_parameters(film.info["comment"].decode())
    assert (found["prompt"], found["To prompt"], found["Frames"]) == ("red apple", "blue boat", "2")
    assert DRAWN.encode() in Path("way.gif").read_bytes()
    draw(*words, "--no-metadata")
    with Image.open("way.gif") as film:
        assert "comment" not in film.info
    assert b"XMP" not in Path("way.gif").read_bytes()


def test_the_pictures_of_a_list_are_marked_row_by_row(draw: Command) -> None:
    draw("red apple", "--steps", "1", "--seed", "1", "-o", "a.png")
    Path("rows.txt").write_text("red apple\nblue boat --init_image a.png\n")
    said = draw("--prompts", "rows.txt", "--steps", "1", "--seed", "1", "-o", "out/", "--preview", "p.png")
    assert [source_of(path) for path in (*said.paths, Path("p.png"))] == [DRAWN, FROM_A_PICTURE, FROM_A_PICTURE]
    said = draw("--prompts", "rows.txt", "--steps", "1", "--seed", "1", "-o", "out/", "--grid", "g.png")
    assert source_of(said.paths[-1]) == FROM_A_PICTURE


def test_what_is_uploaded_is_not_marked_and_what_is_drawn_from_it_is(tmp_path: Path, tiny_model: Path) -> None:
    from diffusion.studio import Form, Studio

    studio = Studio(model=TextToImage.load(tiny_model, "cpu", "fp32"), output=tmp_path)
    *_, last = studio.draw(Form(prompt="red apple", steps=1, init_image=Image.new("RGB", (16, 16), "red")))
    (uploaded,) = (tmp_path / "inputs").iterdir()
    assert source_of(uploaded) is None
    assert [source_of(path) for path in last.files] == [FROM_A_PICTURE]


def test_python_has_the_mark_too(tiny_model: Path) -> None:
    t2i = TextToImage.load(tiny_model, "cpu", "fp32")
    (image,) = t2i("red apple", seed=1, steps=1)
    (changed,) = t2i("red apple", seed=1, steps=1, init_image=image)
    assert [one.info[images.XMP] for one in (image, changed)] == [
        images.mark(composite=made)[images.XMP] for made in (False, True)
    ]
