"""What a picture says of itself makes it again, whatever it was made by; sheets say what their pictures share."""

import json
import shutil
from dataclasses import fields

import numpy as np
import pytest
from PIL import Image

from commands import made
from diffusion import TextToImage
from diffusion.images import read_metadata
from diffusion.models.folder import load_model
from diffusion.parameters import parse_parameters
from diffusion.places import title_of
from diffusion.settings import PICTURES, Settings
from families import save

PROMPT = "red apple"


def again(model, record, **pictures):
    """The picture of a record, by nothing but the record."""
    names = {item.name for item in fields(Settings)} - {"prompts", *PICTURES}
    return model(record["prompt"], **{name: record[name] for name in names & record.keys()}, **pictures)[0]


@pytest.mark.parametrize(
    "given",
    [
        {"sampler": "DPM++ 2M Karras", "clip_skip": 2, "negative_prompt": "boat, cat"},
        {"sigmas": (20, 5, 1, 0)},
        {"guidance_interval": (0.3, None), "guidance_rescale": 0.5},
        {"tile": "xy"},
        {"hires": 1.5, "hires_strength": 0.4, "sampler": "Euler a"},
        {"variation_seed": 9, "variation_strength": 0.3, "num_images": 2, "sampler": "Euler a"},
        {"to_prompt": "blue boat", "to_seed": 5, "frames": 3},
        {"literal": True, "width": 32},
        {"init_image": True, "strength": 0.5},
        {"init_image": True, "sigmas": (5, 1)},
        {"init_image": True, "mask": True},
        {"init_image": True, "mask": True, "mask_blur": 0, "extend": (2, 0, 3, 4)},
    ],
    ids=str,
)
def test_a_record_makes_the_picture_again(tiny, photo, given):
    pictures = {name: path for name, path in zip(("init_image", "mask"), photo, strict=True) if name in given}
    for image in tiny(PROMPT, seed=1, steps=None if "sigmas" in given else 2, **given | pictures):
        record = json.loads(image.info["diffusion"])
        found = again(tiny, record, **pictures)
        assert found.tobytes() == image.tobytes()
        assert found.info == image.info


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
@pytest.mark.parametrize("flag", ["--output", "--grid", "--preview", "--film"])
def test_several_pictures_are_not_drawn_again_into_one_file(draw, tmp_path, flag, dry):
    few, name = ("--steps", "1", "-o"), "x.gif" if flag == "--film" else "x.png"
    assert [draw(PROMPT, "-s", seed, *few, f"{seed}.png").code for seed in "12"] == [0, 0]
    said = draw("--from-image", "1.png", "2.png", flag, name, *dry)
    assert (said.code, said.out, said.err.count("\n")) == (2, "", 1)
    remedy = "give a folder" if flag == "--output" else "leave it out, or draw one picture at a time"
    assert f"{flag} {name} is one file, and each of 2 pictures would write it: {remedy}" in said.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.png", "2.png"]
    assert draw("--from-image", "1.png", flag, name, *dry).code == 0, "of one it is"
    assert len(draw("--from-image", "1.png", "2.png", "-o", "two/").paths) == 2


def test_what_a_prompt_puts_on_is_put_on_once(draw, red, tiny_model):
    said = draw(f"{PROMPT} <lora:red:0.5>", "--lora", f"{red}:0.25", "-s", "1", "--steps", "2")
    record = made(said.paths[0])
    assert [one["weight"] for one in record["loras"]] == [0.25]
    assert [one["weight"] for one in record["prompt_loras"]] == [0.5]
    loras = {str(red): one["weight"] for one in record["loras"]}
    model = TextToImage.load(tiny_model, "cpu", "fp32", loras, lora_folder=red.parent)
    assert again(model, record).tobytes() == Image.open(said.paths[0]).tobytes()
    hashes = parse_parameters(read_metadata(said.paths[0])["parameters"])["Lora hashes"]
    assert hashes == f"red: {record['loras'][0]['hash']}", "once, though it is on it twice"


def test_what_the_network_puts_out_is_recorded_where_it_was_said(draw, tiny_model):
    words = (PROMPT, "-s", "1", "--steps", "2")
    plain, told = draw(*words), draw(*words, "--prediction", "epsilon")
    assert "prediction" not in made(plain.paths[0])
    record = made(told.paths[0])
    assert record["prediction"] == "epsilon"
    assert Image.open(plain.paths[0]).tobytes() != Image.open(told.paths[0]).tobytes(), "of a folder too"
    model = TextToImage.load(tiny_model, "cpu", "fp32", prediction=record["prediction"])
    assert again(model, record).tobytes() == Image.open(told.paths[0]).tobytes()
    assert draw(*words, "--prediction", "x").code == 2


def test_a_model_is_called_what_people_call_it(draw, tiny_model, tmp_path):
    from diffusion.interop import save_single_file

    snapshot = tmp_path / "models--owner--my--name" / "snapshots" / "0123abc"
    shutil.copytree(tiny_model, snapshot)
    assert title_of(snapshot) == "owner/my--name"
    said = draw(PROMPT, "-s", "1", "--steps", "1", "--offline", model=snapshot)
    assert made(said.paths[0])["model"] == "owner/my--name"
    save_single_file(load_model(save("sd1", tmp_path / "sd1")), tmp_path / "one.v2.safetensors")
    said = draw(PROMPT, "-s", "1", "--steps", "1", model=tmp_path / "one.v2.safetensors")
    assert made(said.paths[0])["model"] == "one.v2"
    assert parse_parameters(read_metadata(said.paths[0])["parameters"])["Model"] == "one.v2"


def test_offline_asks_nobody(draw, monkeypatch):
    asked = []

    def snapshot(name, local):
        asked.append(local)

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("diffusion.models.hub._snapshot", snapshot)
    said = draw(PROMPT, "--offline", model="owner/name")
    assert (said.code, asked) == (2, [True])
    assert "the network is not to be asked" in said.err
    with pytest.raises(ValueError, match="the network is not to be asked"):
        TextToImage.load("owner/name", offline=True)
    assert asked == [True, True]


def test_other_programs_see_what_made_it(tiny, photo):
    def shown(**given):
        return parse_parameters(tiny(PROMPT, seed=1, steps=given.pop("steps", 1), **given)[0].info["parameters"])

    assert shown(tile="x")["Tiling"] == "True"
    assert "Tiling" not in shown()
    assert shown(sigmas=(5, 1), steps=None)["Sigmas"] == "5,1"
    assert shown(guidance_interval=(0.3, None))["CFG interval"] == "0.3,inf"
    way = shown(to_prompt="blue boat, sea", to_seed=5, share=0.25)
    assert (way["To prompt"], way["To seed"], way["Share"]) == ("blue boat, sea", "5", "0.25")
    assert shown(init_image=photo[0], mask=photo[1])["Mask blur"] == "4.0"


def test_a_sheet_carries_the_settings_of_its_call(draw):
    words = (PROMPT, "blue boat", "-s", "3", "--num-images", "2", "--steps", "1", "-o", "some/")
    for sheet in ("grid.png", "grid.jpg", "grid.webp"):
        assert draw(*words, "--grid", sheet).code == 0
        record = made(sheet)
        assert (record["prompts"], record["seed"], record["num_images"]) == ([PROMPT, "blue boat"], 3, 2)
        assert record["steps"] == 1
        assert "prompt" not in record
        assert read_metadata(sheet)["parameters"].startswith(f"{PROMPT}\nblue boat\nSteps: 1,")
    draw(*words, "--grid", "bare.png", "--no-metadata")
    assert read_metadata("bare.png") == {}


def test_a_strip_and_the_frames_of_a_call_carry_theirs(draw):
    assert draw(PROMPT, "-s", "3", "--steps", "2", "--film", "film.png").code == 0
    assert made("film.png")["seed"] == 3
    assert draw(PROMPT, "-s", "3", "--steps", "2", "--film", "bare.png", "--no-metadata").code == 0
    assert read_metadata("bare.png") == {}
    assert draw(PROMPT, "-s", "3", "--to-seed", "4", "--frames", "3", "--steps", "1", "--grid", "way.png").code == 0
    record = made("way.png")
    assert (record["to_seed"], record["frames"], "share" in record) == (4, 3, False)


def test_a_comparison_says_what_differs(tiny):
    sheet = tiny.compare(PROMPT, {"sampler": ["DPM++ 2M Karras", "ddim"], "cfg": np.array([1.0, 2.0])}, seed=1, steps=1)
    record = json.loads(sheet.info["diffusion"])
    assert record["compare"] == {"sampler": ["DPM++ 2M Karras", "ddim"], "cfg": [1.0, 2.0]}
    assert record["steps"] == 1
    assert not {"sampler", "schedule", "guidance_scale"} & record.keys()
    shown = parse_parameters(sheet.info["parameters"])
    assert (shown["Script"], shown["Y Values"]) == ("X/Y/Z plot", "cfg=1.0,2.0")
