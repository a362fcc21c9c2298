"""Names that never collide, files that are whole or absent, and metadata that comes back as it was written."""

from pathlib import Path

import pytest
from PIL import Image

from diffusion import images, sheets
from diffusion.images import check_output, parse_output, read_metadata, save_image

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


@pytest.mark.parametrize("suffix", sorted(images.FORMATS))
def test_metadata_round_trip(tmp_path: Path, suffix: str) -> None:
    path = save_image(picture(), tmp_path / f"x{suffix}")
    found = read_metadata(path)
    assert found == {"parameters": images.format_parameters(MADE), "diffusion": MADE}
    assert read_metadata(save_image(picture(), tmp_path / f"y{suffix}", metadata=False)) == {}


def test_parameters_are_written_as_other_tools_read_them() -> None:
    text = images.format_parameters(MADE | {"prompt": "a cat", "model": "m"})
    assert text == (
        "a cat\nNegative prompt: boat, cat\n"
        "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 18446744073709551615, "
        "Size: 512x768, Model hash: 0123456789, Model: m, RNG: CPU, Version: diffusion 1"
    )
    assert "Negative prompt" not in images.format_parameters(MADE | {"negative_prompt": ""})


def test_parameters_are_taken_apart() -> None:
    found = images.parse_parameters(images.format_parameters(MADE))
    assert (found["prompt"], found["negative_prompt"]) == (MADE["prompt"], "boat, cat")
    assert (found["Model"], found["Seed"], found["Size"]) == ("a, b: c", str(2**64 - 1), "512x768")
    assert images.parse_parameters("only a prompt") == {"prompt": "only a prompt", "negative_prompt": ""}


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
