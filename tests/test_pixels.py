"""What becomes of a picture's pixels: colours, transparency, orientation and cropping."""

import struct

import pytest
from PIL import Image, ImageCms

from diffusion.pixels import View, read_pixels


@pytest.mark.parametrize("content", [b"not a picture", b"", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_trap_22_a_broken_picture_is_named(tmp_path, content):
    (tmp_path / "bad.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.png"):
        read_pixels(tmp_path / "bad.png", 8)


def pixel_of(image, tmp_path, suffix="png", background="white", **options):
    file = tmp_path / f"picture.{suffix}"
    image.save(file, **options)
    pixels = read_pixels(file, View(width=8, height=8, background=background))
    assert pixels.shape == (8, 8, 3)
    return pixels[4, 4].tolist()


@pytest.mark.parametrize(
    ("mode", "colour", "options"),
    [
        ("RGBA", (255, 0, 0, 0), {}),
        ("LA", (0, 0), {}),
        ("P", 0, {"transparency": 0}),
        ("RGB", (255, 0, 0), {"transparency": (255, 0, 0)}),
        ("L", 7, {"transparency": 7}),
        ("I;16", 700, {"transparency": 700}),
    ],
)
def test_trap_16_colours_under_transparency_stay_hidden(tmp_path, mode, colour, options):
    picture = Image.new(mode, (8, 8), colour)
    assert pixel_of(picture, tmp_path, **options) == [255, 255, 255]
    assert pixel_of(picture, tmp_path, background="#102030", **options) == [16, 32, 48]


def test_half_transparent_colours_mix_with_the_background(tmp_path):
    assert pixel_of(Image.new("RGBA", (8, 8), (255, 0, 0, 128)), tmp_path) == pytest.approx([255, 127, 127], abs=1)


@pytest.mark.parametrize(("value", "grey"), [(0, 0), (300, 1), (32768, 128), (65535, 255)])
def test_grey_of_16_bits_is_scaled_and_not_clipped(tmp_path, value, grey):
    assert pixel_of(Image.new("I;16", (8, 8), value), tmp_path) == [grey] * 3
    assert pixel_of(Image.new("I;16", (8, 8), value), tmp_path, "tif") == [grey] * 3


def test_cmyk_keeps_its_colours(tmp_path):
    """Ink of one colour: the naive complement is the reference where no profile says otherwise."""
    assert pixel_of(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), tmp_path, "tif") == [255, 0, 0]
    red, green, blue = pixel_of(Image.new("CMYK", (8, 8), (255, 0, 255, 0)), tmp_path, "jpg", quality=95)
    assert green > 250
    assert max(red, blue) < 5


def test_a_colour_profile_is_followed(tmp_path):
    """A gamma of 1 in place of sRGB's curve: linear 0.5 is sRGB 188, which the profile-blind would leave at 128."""
    lab_free = ImageCms.createProfile("sRGB")
    srgb = ImageCms.ImageCmsProfile(lab_free).tobytes()
    assert pixel_of(Image.new("RGB", (8, 8), (200, 100, 50)), tmp_path, icc_profile=srgb) == pytest.approx(
        [200, 100, 50], abs=1
    )
    assert pixel_of(Image.new("RGB", (8, 8), (128,) * 3), tmp_path, icc_profile=linear_profile(srgb)) == pytest.approx(
        [188, 188, 188], abs=2
    )
    broken = pixel_of(Image.new("RGB", (8, 8), (9, 8, 7)), tmp_path, icc_profile=b"no profile")
    assert broken == [9, 8, 7]


def linear_profile(srgb):
    """The sRGB profile with its tone curves replaced by straight lines: tags rTRC, gTRC, bTRC point to a new 'curv'."""
    data = bytearray(srgb)
    place = len(data)
    data += b"curv" + bytes(8)  # no entries: the identity
    for tag in range(struct.unpack(">I", data[128:132])[0]):
        at = 132 + 12 * tag
        if data[at : at + 4] in (b"rTRC", b"gTRC", b"bTRC"):
            data[at + 4 : at + 12] = struct.pack(">II", place, 12)
    data[0:4] = struct.pack(">I", len(data))
    data[84:100] = bytes(16)  # no checksum
    return bytes(data)


def test_of_an_animation_the_first_frame_is_taken(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    assert pixel_of(frames[0], tmp_path, "gif", save_all=True, append_images=frames[1:]) == [255, 0, 0]
    webp = pixel_of(frames[0], tmp_path, "webp", save_all=True, append_images=frames[1:], lossless=True)
    assert webp == [255, 0, 0]


def test_float_pixels_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"picture\.tif.*float"):
        pixel_of(Image.new("F", (8, 8), 0.5), tmp_path, "tif")


def test_a_picture_is_cropped_and_never_stretched(tmp_path):
    wide = Image.new("RGB", (32, 8), "red")
    wide.paste("lime", (12, 0, 20, 8))
    assert pixel_of(wide, tmp_path) == [0, 255, 0]
    assert (read_pixels(tmp_path / "picture.png", 8) == [0, 255, 0]).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_followed(tmp_path, orientation):
    """The corner that a viewer shows at the top left is black, wherever it is stored."""
    corners = {1: (0, 0), 2: (4, 0), 3: (4, 4), 4: (0, 4), 5: (0, 0), 6: (0, 4), 7: (4, 4), 8: (4, 0)}
    left, top = corners[orientation]
    picture = Image.new("RGB", (8, 8), "white")
    picture.paste("black", (left, top, left + 4, top + 4))
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.save(tmp_path / "turned.png", exif=exif)
    pixels = read_pixels(tmp_path / "turned.png", 8)
    assert pixels[:4, :4].max() == 0
    assert pixels[4:].min() == 255
    assert pixels[:, 4:].min() == 255
