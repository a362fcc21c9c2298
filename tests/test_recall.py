"""A picture draws itself again by Python: what is found, what is given in its place, how near it comes."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import diffusion
from diffusion import TextToImage
from diffusion.images import read_metadata, save_image
from diffusion.places import hash_files, weight_files
from diffusion.records import recall
from families import save
from test_foreign import INPAINTED, NEWER, png

PROMPT = "red apple"


@pytest.fixture
def apple(tiny, tiny_model, tmp_path, monkeypatch):
    """A picture of the tiny model, which is in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").symlink_to(tiny_model)
    return save_image(tiny(PROMPT, seed=3, steps=2, negative_prompt="boat")[0], tmp_path / "apple.png")


def record_of(path, **changes):
    """A picture of the same pixels with another record; None takes a value out."""
    with Image.open(path) as opened:
        image = opened.copy()
    record = {k: v for k, v in {**read_metadata(path)["diffusion"], **changes}.items() if v is not None}
    image.info = {"diffusion": json.dumps(record)}
    return save_image(image, path.with_name("changed.png"))


def drawn(model, found):
    """The pictures of a request that was recalled."""
    return [image for step in model.run(found.settings) if step.images for image in step.images]


def test_by_python_it_is_the_same_picture(apple, tmp_path):
    found = diffusion.recall(apple)
    assert (found.program, found.changes, found.notes) == ("diffusion", (), ())
    (image,) = drawn(TextToImage.load(found.model, **found.options), found)
    assert save_image(image, tmp_path / "again.png").read_bytes() == apple.read_bytes()
    verdict = found.verify(image)
    assert (verdict.identical, verdict.levels, verdict.differs) == (True, 0, {})
    assert str(verdict) == f"{apple}: identical"


def test_a_verdict_says_how_far_it_is_and_what_differs(apple, tiny):
    found = diffusion.recall(apple, steps=3)
    (image,) = drawn(tiny, found)
    verdict = found.verify(image)
    stored, other = (np.asarray(one, np.float64) for one in (Image.open(apple), image))
    error = np.square(stored - other).mean()
    assert verdict.levels == np.abs(stored - other).max()
    assert verdict.decibels == pytest.approx(10 * np.log10(255**2 / error))
    assert verdict.differs == {"steps": (2, 3)}
    other = found.verify(image.resize((8, 8)))
    assert (other.identical, other.levels, other.decibels) == (False, None, None)
    assert str(other).startswith(f"{apple}: differs, of another size (")
    near = Image.fromarray(np.asarray(Image.open(apple)) ^ np.uint8(1))  # each level by one
    near.info = Image.open(apple).info
    verdict = recall(apple).verify(near)
    assert (verdict.identical, verdict.levels) == (False, 1)
    assert str(verdict).startswith(f"{apple}: differs, up to 1 of 255, 48.1 dB (as rounding does")
    far = replace(verdict, levels=2)
    assert str(far) == f"{apple}: differs, up to 2 of 255, 48.1 dB", "which rounding does not do in float32"
    assert "as rounding does" in str(replace(far, rounding=30))
    other = diffusion.recall(record_of(apple, torch="0.1", steps=3)).verify(image)
    assert other.differs["torch"][0] == "0.1"


def test_repairs_are_told_in_words(apple, draw):
    """What was repaired then need not be now, and the other way round."""
    path = record_of(apple, repairs=["out of memory: drawn alone", "decoded in tiles"])
    (image,) = drawn(TextToImage.load("tiny", "cpu", "fp32"), recall(path))
    then = "repaired then: out of memory: drawn alone, decoded in tiles"
    assert str(recall(path).verify(image)) == f"{path}: identical ({then}, not repaired now)"
    now = str(recall(apple).verify(Image.open(path)))
    assert now.endswith("identical (not repaired then, repaired now: out of memory: drawn alone, decoded in tiles)")
    said = draw("--from-image", str(path), "--verify", model=None)
    assert (said.code, said.out) == (0, f"{path}: identical ({then}, not repaired now)\n")


def test_another_size_has_no_decibels_in_an_event_either(apple, draw):
    said = draw("--from-image", str(apple), "--verify", "--size", "8x8", "--json", model=None)
    (event,) = [event for event in said.events if event["event"] == "verified"]
    assert (said.code, event["identical"], event["levels"], event["decibels"]) == (1, False, None, None)


CHANGES = [
    ({"steps": 3}, ["steps 3 in place of 2"], {"steps": 3}),
    ({"steps": 2}, [], {"steps": 2}),
    ({"prompts": ("blue boat",)}, ["prompts blue boat in place of red apple"], {"prompts": ("blue boat",)}),
    ({"negative_prompt": ""}, ["negative_prompt nothing in place of boat"], {"negative_prompt": ""}),
    ({"sampler": "DPM++ 2M Karras"}, ["sampler DPM++ 2M Karras in place of ddim"], {"schedule": "karras"}),
    ({"sigmas": (5, 1)}, ["without steps 2", "without schedule trailing"], {"steps": 2, "schedule": None}),
    ({"guidance_scale": 1}, ["without negative_prompt boat"], {"negative_prompt": ""}),
    ({"num_images": 3}, ["num_images 3 in place of 1"], {"num_images": 3, "seed": 3}),
    ({"num_images": 1}, [], {"num_images": 1}),
    ({"batch_size": 1}, [], {"batch_size": 1}),
    ({"hires": 2}, ["hires 2 in place of nothing"], {"hires": 2}),
]


@pytest.mark.parametrize(("given", "changes", "fields"), CHANGES, ids=lambda value: str(value)[:40])
def test_what_is_given_stands_in_for_what_is_recorded(apple, given, changes, fields):
    found = recall(apple, **given)
    assert set(changes) <= set(found.changes)
    assert bool(found.changes) == bool(changes)
    assert {name: getattr(found.settings, name) for name in fields} == fields
    kept = {"seed": 3, "width": 16, "height": 16}
    assert {name: getattr(found.settings, name) for name in kept} == kept


def test_sigmas_go_when_steps_are_given(apple):
    path = record_of(apple, sigmas=[20, 5], schedule=None)
    assert recall(path).settings.sigmas == (20, 5)
    found = recall(path, steps=4)
    assert (found.settings.sigmas, found.settings.steps) == (None, 4)
    assert "without sigmas [20, 5]" in found.changes


def test_a_model_is_found_or_asked_for(apple, tiny_model, tmp_path, monkeypatch):
    assert recall(apple).model == Path("tiny")
    with pytest.raises(ValueError, match=r"its model 'gone' \([0-9a-f]{10}\) is not here: give model"):
        recall(record_of(apple, model="gone"))
    hashed = hash_files(weight_files(tiny_model))
    found = recall(record_of(apple, model_hash="0123456789"))
    assert found.notes == (f"the model tiny has the hash {hashed}, and the picture was drawn with 0123456789",)
    assert recall(record_of(apple, model="gone"), model=tiny_model).notes == ()
    monkeypatch.setattr("diffusion.models.hub._snapshot", lambda name, local: tiny_model if local else 1 / 0)
    assert recall(record_of(apple, model="owner/name")).model == tiny_model


def test_one_file_is_found_by_its_name_and_automatic1111s_hash(apple, tmp_path):
    from diffusion.interop import save_single_file
    from diffusion.models.folder import load_model

    save_single_file(load_model(save("sd1", tmp_path / "sd1")), tmp_path / "some.v2.safetensors")
    digest = hashlib.sha256((tmp_path / "some.v2.safetensors").read_bytes()).hexdigest()
    texts = {"parameters": NEWER.replace("Model: m", "Model: some.v2").replace("hash: abc", f"hash: {digest[:10]}")}
    found = recall(png(tmp_path / "x.png", **texts))
    assert found.model == Path("some.v2.safetensors")
    assert not [note for note in found.notes if "hash" in note and "TI" not in note]
    other = recall(png(tmp_path / "x.png", **texts), model="tiny")
    assert any("the model tiny has the hash" in note and digest[:10] in note for note in other.notes)


def test_loras_are_found_by_name_or_hash(apple, red, tmp_path):
    hashed = hash_files([red])
    path = record_of(apple, loras=[{"name": "red", "weight": 0.5, "hash": hashed}])
    assert recall(path).loras == {"loras/red.safetensors": 0.5}
    red.rename(tmp_path / "blue.safetensors")
    with pytest.raises(ValueError, match=rf"the LoRA 'red' \({hashed}\) is not in loras/: give lora or lora_folder"):
        recall(path)
    assert recall(path, loras={"blue.safetensors": None}).loras == {"blue.safetensors": 0.5}
    assert recall(path, loras={"blue.safetensors": 0.0}).loras == {"blue.safetensors": 0.0}
    other = record_of(apple, loras=[{"name": "blue", "weight": 0.5, "hash": "0123456789"}])
    assert recall(other, lora_folder=".").notes == (
        f"the LoRA blue.safetensors has the hash {hashed}, and the picture was drawn with 0123456789",
    )
    with pytest.raises(ValueError, match=r"the LoRA '\.\./red'"):
        recall(record_of(apple, loras=[{"name": "../red", "weight": 1}]))


def test_loras_of_the_prompt_are_compared(apple, red):
    data = red.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    tagged = {"prompt": "red apple <lora:red:0.5>"}
    for good in (hash_files([red]), hashlib.sha256(data[start:]).hexdigest()[:12]):
        assert recall(record_of(apple, **tagged, prompt_loras=[{"name": "red", "hash": good}])).notes == ()
    path = record_of(apple, **tagged, prompt_loras=[{"name": "red", "hash": "00"}, {"name": "ink", "hash": "11"}])
    said = recall(path).notes
    assert "the LoRA loras/red.safetensors has the hash" in said[0]
    assert said[1] == "the LoRA ink was on the model, and the prompt does not name it: give it by lora"
    assert recall(path, prompts=("blue boat",)).notes == ()


def test_a_picture_to_begin_from_is_the_same_one(tiny, apple, photo, tmp_path):
    begun = save_image(tiny(PROMPT, seed=3, steps=1, init_image=photo[0], mask=photo[1])[0], tmp_path / "sub/begun.png")
    assert recall(begun).settings.init_image == "photo.png"
    photo[0].rename(tmp_path / "sub/photo.png")
    assert recall(begun).settings.init_image == str(tmp_path / "sub/photo.png")
    Image.new("RGB", (21, 19)).save(tmp_path / "sub/photo.png")
    with pytest.raises(
        ValueError, match=r"drawn from a picture 'photo\.png' \([0-9a-f]{10}\), which is not here, and .*other"
    ):
        recall(begun)
    photo[1].rename(tmp_path / "other.png")
    with pytest.raises(
        ValueError,
        match=r"drawn from a picture 'photo\.png' .* give init_image; and from a picture 'mask\.png' .*: give mask$",
    ):
        recall(begun)
    (tmp_path / "other.png").rename(photo[1])
    found = recall(begun, init_image=apple)
    assert found.settings.init_image == apple
    assert "is not the picture 'photo.png'" in found.notes[0]
    held = Image.open(photo[1])
    kept = save_image(tiny(PROMPT, seed=3, steps=1, init_image=held)[0], tmp_path / "held.png")
    with pytest.raises(ValueError, match="a picture that has no name, which is not here: give init_image"):
        recall(kept)
    assert recall(kept, init_image=photo[1]).notes == (), "the same pixels"
    other = png(tmp_path / "other.png", parameters=INPAINTED.replace("Model: m", "Model: tiny"))
    with pytest.raises(ValueError, match="give init_image"):
        recall(other)
    assert recall(other, init_image=apple, mask=photo[1]).settings.strength == 0.75


def test_a_sheet_of_one_prompt_is_drawn_again_and_a_comparison_is_not(apple, tiny, tmp_path):
    from diffusion.images import sheet_texts

    images = tiny([PROMPT, "blue boat"], seed=3, steps=1, num_images=2)
    sheet = Image.new("RGB", (8, 8))
    sheet.info = sheet_texts(images, prompts=[PROMPT, "blue boat"], seed=3, num_images=2)
    wanted = recall(save_image(sheet, tmp_path / "sheet.png")).settings
    assert [one.tobytes() for one in drawn(tiny, recall(tmp_path / "sheet.png"))] == [one.tobytes() for one in images]
    assert (wanted.prompts, wanted.num_images) == ((PROMPT, "blue boat"), 2)
    save_image(tiny.compare(PROMPT, {"steps": [1, 2]}, seed=1), tmp_path / "table.png")
    with pytest.raises(ValueError, match="it compares pictures"):
        recall(tmp_path / "table.png")


DAMAGED = [
    ({"prompt": None}, "no prompt"),
    ({"prompt": 5}, "a prompt must be text"),
    ({"prompts": "ab"}, "its prompts are no list"),
    ({"steps": "many"}, "steps must be a whole number, got 'many'"),
    ({"sampler": "lms"}, "unknown sampler 'lms', must be one of euler"),
    ({"schedule": "polyexponential"}, "unknown schedule 'polyexponential'"),
    ({"loras": 5}, "its record is damaged"),
    ({"loras": ["red"]}, "its record is damaged"),
    ({"init_image": 5}, "its record is damaged"),
    ({"init_image": {"name": "x" * 300, "sha256": "12"}}, "its record is damaged"),
    ({"mask": {"name": "x"}}, "which is not here: give mask"),
    ({"control": {"name": "canny", "hash": "12"}}, "its ControlNet 'canny' (12) is not here: give control"),
]


@pytest.mark.parametrize(("changes", "message"), DAMAGED, ids=lambda value: str(value)[:30])
def test_a_record_that_cannot_be_met_is_one_line(apple, changes, message):
    with pytest.raises(ValueError, match=r"changed\.png cannot be drawn again: ") as caught:
        recall(record_of(apple, **changes))
    assert message in str(caught.value)


def test_what_is_given_is_looked_for_where_it_is(apple, red, tmp_path):
    """A model that is not here yet, LoRAs of any name, folders of another machine, a ControlNet beside the picture."""
    assert recall(apple, model="owner/name").model == "owner/name", "what loads it finds it, or says what is wrong"
    assert recall(record_of(apple, prediction="epsilon")).options["prediction"] == "epsilon"
    assert recall(apple, loras={str(red): None}).loras == {str(red): 1.0}
    assert recall(apple, loras={str(red): 0.5}).loras == {str(red): 0.5}
    named = record_of(apple, loras=[{"name": "C:\\loras\\red", "weight": 0.25}])
    assert recall(named).loras == {"loras/red.safetensors": 0.25}
    changed = tmp_path / "other/red.safetensors"
    changed.parent.mkdir()
    changed.write_bytes(red.read_bytes()[:-4] + b"\0\0\0\1")
    found = recall(
        record_of(apple, loras=[{"name": "red", "weight": 0.25, "hash": "0123456789"}]), loras={str(changed): None}
    )
    assert found.loras == {str(changed): 0.25}, "the name is enough"
    assert "the picture was drawn with 0123456789" in found.notes[0]
    net = tmp_path / "other/canny"
    net.mkdir()
    (net / "diffusion_pytorch_model.safetensors").write_bytes(red.read_bytes())
    led = record_of(apple, control={"name": "canny", "hash": "0123456789"})
    led = led.rename(tmp_path / "other/led.png")
    assert recall(led).options["control"] == net, "beside the picture"
    assert "the ControlNet" in recall(led).notes[0]
    long = recall(apple, negative_prompt="boat " * 30).changes
    assert long == (f"negative_prompt {('boat ' * 30)[:77]}... in place of boat",)
    assert recall(record_of(apple, guidance_rescale=0), guidance_scale=1).changes == (
        "guidance_scale 1 in place of 3.0",
        "without negative_prompt boat",
    )


def test_precision_and_device_are_the_recorded_ones_unless_given(apple):
    assert {"device": "cpu", "dtype": "float32"}.items() <= recall(apple).options.items()
    assert {"device": "cuda:1", "dtype": "bf16"}.items() <= recall(apple, device="cuda:1", dtype="bf16").options.items()
    assert recall(record_of(apple, device="cuda", dtype="float16")).options["device"] is None, "whichever is here"
