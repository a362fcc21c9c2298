"""A picture draws itself again: its own metadata or another program's, by the command line and by Python."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import diffusion
from diffusion import TextToImage, foreign
from diffusion.images import read_metadata, save_image
from diffusion.places import hash_files, weight_files
from diffusion.records import read_record, recall
from families import save
from test_controls import photo, red  # noqa: F401 - fixtures
from test_generate_cli import draw, made, process  # noqa: F401 - a fixture

PROMPT = "red apple"


@pytest.fixture(scope="module")
def tiny(tiny_model):
    return TextToImage.load(tiny_model, "cpu", "fp32")


def png(path, size=(32, 16), late=False, **texts):
    """A grey picture with texts of another program; ``late`` puts them behind the pixels."""
    info = PngInfo()
    for key, text in texts.items():
        info.add_text(
            key.replace("_", "-") if key in ("negative_prompt", "sd_metadata") else key, text, zip=len(text) > 40
        )
    Image.new("RGB", size, "grey").save(path, pnginfo=info)
    if late:
        data = path.read_bytes()
        chunk = data[data.index(b"tEXt") - 4 : data.index(b"IDAT") - 4]
        end = data.index(b"IEND") - 4
        path.write_bytes(data[: data.index(b"tEXt") - 4] + data[data.index(b"IDAT") - 4 : end] + chunk + data[end:])
    return path


def drawn(model, found):
    """The pictures of a request that was recalled."""
    return [image for step in model.run(found.settings) if step.images for image in step.images]


# --- other programs: fixtures as those programs write them

A1111 = (
    "red apple, (shiny:1.2) <lora:ink:0.7>\nNegative prompt: boat, blurry\n"
    "Steps: 20, Sampler: DPM++ 2M Karras, CFG scale: 6.5, Seed: 965400086, Size: 512x768, Model hash: 6ce0161689, "
    "Model: v1-5-pruned-emaonly, Denoising strength: 0.45, Clip skip: 2, ENSD: 31337, Hires upscale: 1.5, "
    'Hires upscaler: Latent, Lora hashes: "ink: 9ac1f0ab1234, line: 77aa", Version: v1.6.0'
)
NEWER = (
    "red apple\nSteps: 8, Sampler: DPM++ 2M, Schedule type: SGM Uniform, CFG scale: 1, Seed: 3, Size: 64x64, "
    "Model hash: abc, Model: m, Variation seed: 7, Variation seed strength: 0.25, Tiling: True, RNG: CPU, "
    'TI hashes: "me: 12ab", Version: v1.10.1, Hashes: {"model": "abc", "lora:ink": "12cd"}'
)
FORGE = (
    "red apple\nSteps: 20, Sampler: DPM++ 2M SDE, Schedule type: Automatic, CFG scale: 7, Seed: 4, Size: 64x64, "
    "Model: m, Beta schedule alpha: 0.6, Module 1: ae, Version: f2.0.1v1.10.1-previous-304-g394da019"
)
SDNEXT = (
    "red apple\nNegative prompt: boat\nSteps: 20, Seed: 5, Sampler: Euler a, CFG scale: 7, Size: 64x64, Parser: Full, "
    "Model: m, Model hash: abcd, Backend: Diffusers, App: SD.Next, Version: 0405, Operations: txt2img; hires, "
    "Pipeline: StableDiffusionPipeline, Second pass: True, Hires scale: 2, Denoising strength: 0.3, CFG rescale: 0.7"
)
INPAINTED = (
    "red apple\nSteps: 20, Sampler: Euler, CFG scale: 7, Seed: 6, Size: 64x64, Model: m, Denoising strength: 0.75, "
    "Mask blur: 4, Version: v1.6.0"
)
FORMATS = {
    "AUTOMATIC1111": (
        {"parameters": A1111},
        {"steps": 20, "sampler": "DPM++ 2M Karras", "guidance_scale": 6.5, "seed": 965400086, "width": 512}
        | {"height": 768, "hires": 1.5, "hires_strength": 0.45, "clip_skip": 2, "negative_prompt": "boat, blurry"}
        | {
            "model": "v1-5-pruned-emaonly",
            "model_hash": "6ce0161689",
            "prompt": "red apple, (shiny:1.2) <lora:ink:0.7>",
        }
        | {"prompt_loras": [{"name": "ink", "hash": "9ac1f0ab1234"}, {"name": "line", "hash": "77aa"}]},
        ["ENSD 31337", "Hires upscaler Latent", "drawn on a GPU"],
    ),
    "1.10": (
        {"parameters": NEWER},
        {"sampler": "DPM++ 2M", "schedule": "SGM Uniform", "variation_seed": 7, "variation_strength": 0.25}
        | {"tile": "xy", "prompt_loras": [{"name": "ink", "hash": "12cd"}]},
        ["TI hashes me: 12ab"],
    ),
    "Forge": (
        {"parameters": FORGE},
        {"sampler": "DPM++ 2M SDE", "schedule": "exponential", "seed": 4},
        ["Beta schedule alpha 0.6, Module 1 ae", "drawn on a GPU"],
    ),
    "SD.Next": (
        {"parameters": SDNEXT},
        {"sampler": "Euler a", "schedule": "discrete", "hires": 2, "hires_strength": 0.3, "guidance_rescale": 0.7},
        ["drawn on a GPU"],
    ),
    "a picture and a mask": (
        {"parameters": INPAINTED},
        {"strength": 0.75, "mask_blur": 4, "init_image": foreign.UNNAMED, "mask": foreign.UNNAMED},
        ["drawn on a GPU"],
    ),
    "only a prompt": ({"parameters": "red apple"}, {"prompt": "red apple", "width": 32, "height": 16}, ["GPU"]),
    "kohya": (
        {
            "prompt": PROMPT,
            "negative_prompt": "boat",
            "seed": "42",
            "sampler": "k_euler_a",
            "steps": "30",
            "scale": "7.5",
        }
        | {"original-height": "16", "crop-top": "8", "clip-prompt": "apple"},
        {"prompt": PROMPT, "negative_prompt": "boat", "seed": 42, "sampler": "euler_a", "steps": 30}
        | {"guidance_scale": 7.5, "width": 32, "height": 16},
        ["clip-prompt apple, crop-top 8"],
    ),
    "InvokeAI": (
        {
            "invokeai_metadata": json.dumps(
                {"generation_mode": "txt2img", "positive_prompt": "red apple++", "negative_prompt": "boat"}
                | {"width": 512, "height": 640, "seed": 9, "rand_device": "cpu", "cfg_scale": 7.5, "steps": 25}
                | {"cfg_rescale_multiplier": 0.5, "scheduler": "dpmpp_2m_k", "clip_skip": 1, "seamless_x": True}
                | {"model": {"key": "k", "hash": "blake3:12", "name": "dreamshaper", "base": "sd-1", "type": "main"}}
                | {"loras": [{"model": {"name": "ink", "hash": "sha256:77aa"}, "weight": 0.6}], "app_version": "5.0.0"}
                | {"vae": {"name": "other"}, "controlnets": [], "positive_style_prompt": ""}
            )
        },
        {"prompt": "red apple++", "width": 512, "height": 640, "seed": 9, "guidance_scale": 7.5, "steps": 25}
        | {"guidance_rescale": 0.5, "sampler": "dpmpp_2m", "schedule": "karras", "clip_skip": 2, "tile": "x"}
        | {"model": "dreamshaper", "model_hash": "", "loras": [{"name": "ink", "weight": 0.6, "hash": "77aa"}]}
        | {"literal": True},
        ['vae {"name": "other"}', "weights in InvokeAI's way (e++)"],
    ),
    "InvokeAI 3": (
        {
            "invokeai_metadata": json.dumps(
                {"generation_mode": "img2img", "positive_prompt": PROMPT, "negative_prompt": "", "seed": 1, "steps": 5}
                | {"cfg_scale": 7, "scheduler": "euler", "strength": 0.6, "init_image": "begin.png", "width": 8}
                | {"model": {"model_name": "stable-diffusion-v1-5", "base_model": "sd-1"}, "height": 8}
            )
        },
        {"strength": 0.6, "init_image": {"name": "begin.png", "sha256": ""}, "model": "stable-diffusion-v1-5"},
        [],
    ),
    "InvokeAI 2": (
        {
            "sd_metadata": json.dumps(
                {"model": "stable diffusion", "model_weights": "stable-diffusion-1.5", "model_hash": "cc6cb27103"}
                | {
                    "image": {"prompt": [{"prompt": "red apple [boat]", "weight": 1.0}], "steps": 50, "cfg_scale": 7.5}
                    | {"threshold": 0, "perlin": 0.1, "height": 512, "width": 512, "seed": 3, "seamless": True}
                    | {"type": "txt2img", "sampler": "k_euler_a", "variations": [], "hires_fix": False}
                }
            )
        },
        {"prompt": PROMPT, "negative_prompt": "boat", "steps": 50, "sampler": "euler_a", "tile": "xy"}
        | {"model": "stable-diffusion-1.5", "model_hash": "cc6cb27103"},
        ["perlin 0.1"],
    ),
    "Dream": (
        {"Dream": '"red apple [boat]" -s 50 -S 12 -W 64 -H 32 -C7.5 -A k_heun -G 0.8'},
        {"prompt": PROMPT, "negative_prompt": "boat", "steps": 50, "seed": 12, "width": 64, "height": 32}
        | {"guidance_scale": 7.5, "sampler": "heun"},
        ["-G 0.8"],
    ),
}
NODES = {
    "3": {"class_type": "KSampler"}
    | {
        "inputs": {"seed": 8, "steps": 12, "cfg": 6.5, "sampler_name": "dpmpp_2m_sde_gpu", "scheduler": "simple"}
        | {"denoise": 1, "model": ["10", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0]}
    },
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "sd\\dreamshaper_8.safetensors"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 32, "batch_size": 1}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "red apple [new]", "clip": ["11", 0]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "boat", "clip": ["11", 0]}},
    "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
    "9": {"class_type": "SaveImage", "inputs": {"filename_prefix": "x", "images": ["8", 0]}},
    "10": {"class_type": "LoraLoader"}
    | {
        "inputs": {"lora_name": "ink.safetensors", "strength_model": 0.8, "strength_clip": 0.8}
        | {"model": ["4", 0], "clip": ["4", 1]}
    },
    "11": {"class_type": "CLIPSetLastLayer", "inputs": {"stop_at_clip_layer": -2, "clip": ["10", 1]}},
}
FORMATS["ComfyUI"] = (
    {"prompt": json.dumps(NODES), "workflow": "{}"},
    {"prompt": r"red apple \[new\]", "negative_prompt": "boat", "seed": 8, "steps": 12, "guidance_scale": 6.5}
    | {"sampler": "dpmpp_2m_sde", "schedule": "trailing", "width": 64, "height": 32, "clip_skip": 2}
    | {"model": "dreamshaper_8", "loras": [{"name": "ink", "weight": 0.8, "hash": ""}]},
    [],
)


GPU = "its noise was drawn on a GPU: drawn on the CPU, the same settings give another picture"
TEXT = "AND and tags other than <lora:...> are text here"
INVOKED = {"positive_prompt": PROMPT, "negative_prompt": "", "seed": 1, "steps": 5, "scheduler": "euler"}
DREAMT = {"prompt": f"{PROMPT} [boat]", "steps": 5, "seed": 3, "strength": 0.6, "sampler": "k_lms", "hires_fix": False}


def a1111(said, prompt=PROMPT):
    """A picture of AUTOMATIC1111 of 20 steps of Euler, noise of the CPU, that says some more."""
    return {"parameters": f"{prompt}\nSteps: 20, Sampler: Euler, Seed: 1, RNG: CPU, {said}"}


def comfy(**nodes):
    """ComfyUI's graph with other inputs of its nodes, or with more nodes."""
    changed = {key[1:]: {**NODES.get(key[1:], {}), **node} for key, node in nodes.items()}
    return {"prompt": "\n" + json.dumps(NODES | changed)}


def inputs(number, **changes):
    return {"inputs": NODES[number]["inputs"] | changes}


DETAILS = [  # texts, what of the record is so, all notes
    (a1111("Schedule type: Automatic"), {"schedule": "discrete", "program": "AUTOMATIC1111"}, []),
    ({"parameters": "x\nSteps: 2, Sampler: DPM++ 2M, Schedule type: Automatic, RNG: CPU"}, {"schedule": "karras"}, []),
    ({"parameters": "x\nSteps: 2, Sampler: DPM++ 2M Karras, Seed: 1, RNG: CPU"}, {"schedule": None}, []),
    (a1111("Schedule type: Simple"), {"schedule": "trailing"}, []),
    (a1111("Schedule type: Normal"), {"schedule": "discrete"}, []),
    (a1111("Version: diffusion 0.1.0"), {"program": "diffusion"}, []),
    (a1111('CFG interval: "0.3,inf"'), {"guidance_interval": [0.3, float("inf")]}, []),
    (a1111('Sigmas: "5,1.5"'), {"sigmas": [5, 1.5]}, []),
    (a1111("Tiling: False"), {"tile": ""}, []),
    (a1111("", "red AND apple"), {"prompt": "red AND apple"}, [TEXT]),
    (a1111("", "<hypernet:x:1> apple"), {}, [TEXT]),
    (a1111("", "RANDOM <lora:x:1> apple"), {}, []),
    (a1111("Size: 64x64, Hires resize: 96x96, Hires steps: 20, Denoising strength: 0.4"),
     {"hires": 1.5, "hires_strength": 0.4, "strength": None, "init_image": None}, []),
    (a1111("Hires upscale: 2, Hires steps: 0, Denoising strength: 0.4"), {"hires": 2}, []),
    (a1111("Hires upscale: 2, Hires steps: 9, Denoising strength: 0.4"), {"hires": 2},
     ["recorded, and not done here: Hires steps 9"]),
    (a1111("Hires upscale: 1, Denoising strength: 0.4"), {"hires": None, "strength": 0.4}, []),
    (a1111("First pass size: 0x0, Denoising strength: 0.4"), {"strength": None, "init_image": None},
     ["recorded, and not done here: First pass size 0x0"]),
    (a1111('Lora hashes: "ink: 12, line: 34", Hashes: {"lora:other": "56"}'),
     {"prompt_loras": [{"name": "ink", "hash": "12"}, {"name": "line", "hash": "34"}]}, []),
    (a1111('Hashes: {"model": "ab", "lora:ink": "12"}, Civitai resources: [{"a": "b, c: d"}], Version: v1'),
     {"prompt_loras": [{"name": "ink", "hash": "12"}]}, []),
    (a1111(f"Wildcard: {'x' * 80}, Empty: "), {}, [f"recorded, and not done here: Wildcard {'x' * 57}..."]),
    ({"parameters": "x\nSteps: 2, Sampler: Euler, Seed: 1"}, {"schedule": "discrete"}, [GPU]),
    ({"invokeai_metadata": json.dumps(INVOKED | {"seamless_x": True, "seamless_y": True, "strength": 0.5}
     | {"positive_style_prompt": PROMPT, "negative_style_prompt": "", "generation_mode": "txt2img", "vae": ""}
     | {"loras": [{"lora": {"model_name": "ink"}, "weight": 0.5}], "rand_device": "cuda"})},
     {"tile": "xy", "strength": None, "init_image": None, "loras": [{"name": "ink", "hash": "", "weight": 0.5}]},
     ["recorded, and not done here: noise drawn on cuda"]),
    ({"parameters": "x"}
     | {"invokeai_metadata": json.dumps(INVOKED | {"strength": 0.5, "generation_mode": "sdxl_img2img"})},
     {"strength": 0.5, "init_image": foreign.UNNAMED, "program": "InvokeAI", "clip_skip": 1}, []),
    ({"sd-metadata": json.dumps({"image": DREAMT | {"type": "txt2img", "perlin": 0, "orig_hash": None}})},
     {"strength": None, "init_image": None, "sampler": "lms"}, []),
    ({"sd-metadata": json.dumps({"image": DREAMT | {"type": "img2img", "orig_hash": "ab", "mask_hash": "cd"}})},
     {"strength": 0.6, "init_image": foreign.UNNAMED}, []),
    ({"Dream": f'"{PROMPT}" -s 5 -I begin.png -f 0.6 -n 3 -b 1 -g -d 5 -U'},
     {"strength": 0.6, "init_image": {"name": "begin.png", "sha256": ""}}, ["recorded, and not done here: -U set"]),
    ({"Dream": f'"{PROMPT}" -s 5 -f 0.6'}, {"strength": None}, []),
    ({"prompt": PROMPT, "scale": "7", "crop-left": "0", "original-width": "8", "raw-prompt": "x"},
     {"guidance_scale": 7, "program": "kohya"}, []),
    (comfy(_3=inputs("3", sampler_name="uni_pc_bh2", denoise=0.5), _5=inputs("5", batch_size=2)),
     {"sampler": "uni_pc", "strength": None, "program": "ComfyUI"},
     ["recorded, and not done here: batch_size 2, denoise 0.5"]),
    (comfy(_5={"class_type": "VAEEncode", "inputs": {"pixels": ["12", 0]}}, _3=inputs("3", denoise=0.6),
           _12={"class_type": "LoadImage", "inputs": {"image": "begin.png"}}),
     {"strength": 0.6, "init_image": {"name": "begin.png", "sha256": ""}}, []),
    (comfy(_10=inputs("10", model=["12", 0], strength_clip=0.1),
           _12={"class_type": "LoraLoaderModelOnly"}
           | {"inputs": {"lora_name": "a/line.safetensors", "strength_model": 0.3, "model": ["4", 0]}}),
     {"loras": [{"name": "line", "weight": 0.3, "hash": ""}, {"name": "ink", "weight": 0.8, "hash": ""}]}, []),
]  # fmt: skip


@pytest.mark.parametrize(("texts", "expected", "notes"), DETAILS, ids=[str(number) for number in range(len(DETAILS))])
def test_what_they_write_means_what_it_means_there(tmp_path, texts, expected, notes):
    found = read_record(png(tmp_path / "x.png", **texts))
    assert {key: {"program": found.program, **found.record}.get(key) for key in expected} == expected
    assert list(found.notes) == notes


@pytest.mark.parametrize("name", FORMATS)
def test_other_programs_are_read(tmp_path, name):
    texts, expected, notes = FORMATS[name]
    found = read_record(png(tmp_path / "x.png", **texts))
    assert {key: found.record.get(key) for key in expected} == expected
    said = "; ".join(found.notes)
    assert all(note in said for note in notes)
    assert bool(said) == bool(notes)


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
@pytest.mark.parametrize(
    ("code", "encoding"), [(b"UNICODE\0", "utf-16-be"), (b"UNICODE\0", "utf-16-le"), (b"ASCII\0\0\0", "utf-8")]
)
def test_what_exif_says_is_read_in_every_order_of_bytes(tmp_path, suffix, code, encoding):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = code + A1111.encode(encoding)
    Image.new("RGB", (8, 8)).save(tmp_path / f"x{suffix}", exif=exif)
    assert read_record(tmp_path / f"x{suffix}").record["seed"] == 965400086


def test_what_comfyui_puts_into_exif_and_others_behind_the_pixels_is_read(tmp_path):
    exif = Image.Exif()
    exif[0x0110] = f"prompt:{json.dumps(NODES)}"
    Image.new("RGB", (8, 8)).save(tmp_path / "x.webp", exif=exif)
    assert read_record(tmp_path / "x.webp").record["steps"] == 12
    assert read_record(png(tmp_path / "late.png", late=True, Dream='"red apple" -s 5')).record["steps"] == 5


def test_info_shows_them(tmp_path, capsys):
    from diffusion.cli.info import run

    texts = FORMATS["InvokeAI"][0] | {"invokeai_graph": "{}", "invokeai_workflow": "{}", "workflow": "{}"}
    assert run([str(png(tmp_path / "x.png", **texts))]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["invokeai_metadata"]["scheduler"] == "dpmpp_2m_k"
    assert {"invokeai_graph", "invokeai_workflow", "workflow"} <= shown.keys()


def without(**changes):
    """ComfyUI's graph with other nodes."""
    return json.dumps({**NODES, **{key.strip("_"): value for key, value in changes.items()}})


UNREADABLE = [
    ({}, "says nothing of how it was made"),
    ({"Software": "GIMP"}, "says nothing of how it was made"),
    ({"parameters": '{"sui_image_params": {}}'}, "JSON of a program that is not known"),
    ({"parameters": NEWER.replace("Seed: 3", "Seed: x")}, "Seed 'x' is no number"),
    ({"invokeai_metadata": "{"}, "damaged JSON"),
    ({"invokeai_metadata": "[" * 100_000}, "damaged JSON"),
    ({"invokeai_metadata": "[]"}, "no JSON object"),
    ({"Dream": "a cat"}, "not a prompt in quotes"),
    ({"prompt": without(_12={"class_type": "UpscaleModelLoader", "inputs": {}})}, "it has UpscaleModelLoader"),
    ({"prompt": without(_12=NODES["3"])}, "it has 2 KSampler nodes"),
    (
        {"prompt": without(_6={"class_type": "CLIPTextEncode", "inputs": {"text": ["9", 0]}})},
        "positive prompt is no plain",
    ),
    ({"prompt": without(_10={"class_type": "LoraLoader", "inputs": {"model": ["10", 0]}})}, "circle"),
    ({"prompt": without(_3={"class_type": "KSampler", "inputs": {}})}, "nothing for positive"),
    (
        {"prompt": without(_6={"class_type": "Note", "inputs": {"text": "red", "clip": ["11", 0]}})},
        "positive prompt is no plain",
    ),
    ({"sd_metadata": '{"image": 5}'}, "not written as it should be"),
]


@pytest.mark.parametrize(("texts", "message"), UNREADABLE, ids=[str(number) for number in range(len(UNREADABLE))])
def test_what_cannot_be_read_is_one_line(draw, tmp_path, texts, message):  # noqa: F811
    path = png(tmp_path / "x.png", **texts)
    with pytest.raises(ValueError, match=r"x\.png") as caught:
        recall(path)
    assert message in str(caught.value)


# --- our own, by the command line: the same bytes

OWN = {
    "plain": [PROMPT, "-s", "3"],
    "one of a batch": [PROMPT, "-s", "3", "--num-images", "3", "--batch-size", "2", "--sampler", "Euler a"],
    "a variation": [PROMPT, "-s", "3", "--variation-seed", "9", "--variation-strength", "0.3", "--num-images", "2"],
    "on the way": [PROMPT, "-s", "3", "--to-prompt", "blue boat", "--to-seed", "5", "--frames", "3"],
    "a share of the way": [PROMPT, "-s", "3", "--to-prompt", "blue boat", "--share", "0.4"],
    "from a picture": [PROMPT, "-s", "3", "-i", "photo.png", "--strength", "0.5"],
    "a mask": [PROMPT, "-s", "3", "-i", "photo.png", "--mask", "mask.png", "--mask-blur", "2"],
    "beyond the edges": [PROMPT, "-s", "3", "-i", "photo.png", "--extend", "left=4"],
    "larger": [PROMPT, "-s", "3", "--hires", "1.5", "--hires-strength", "0.4"],
    "an interval": [PROMPT, "-s", "3", "--cfg", "4", "--guidance-interval", "0.3,inf", "--guidance-rescale", "0.5"],
    "no guidance": [PROMPT, "-s", "3", "--cfg", "1"],
    "sigmas": [PROMPT, "-s", "3", "--sigmas", "20,5,1,0"],
    "a tile": [PROMPT, "-s", "3", "--tile", "xy", "-n", "boat"],
    "another layer": [PROMPT, "-s", "3", "--clip-skip", "2", "--sampler", "DPM++ 2M Karras", "-W", "32"],
    "a LoRA": [PROMPT, "-s", "3", "--lora", "loras/red.safetensors:0.5"],
    "a LoRA of the prompt": [f"{PROMPT} <lora:red:0.5>", "-s", "3"],
    "a long prompt": [" ".join([PROMPT] * 30), "-s", "3", "--long-prompts"],
    "weights": ["(red:1.4) [apple] BREAK blue", "-s", "3"],
    "to the letter": ["(red:1.4) [apple]", "-s", "3", "--literal"],
    "half precision": [PROMPT, "-s", "3", "--dtype", "bf16"],
}


@pytest.fixture
def studio(draw, photo, red, tiny_model, tmp_path):  # noqa: F811
    """The command, in a folder with the tiny model, a picture, a mask and a LoRA."""
    (tmp_path / "tiny").symlink_to(tiny_model)
    return draw


def again(command, path, *words):
    """The file that a picture makes of itself."""
    said = command("--from-image", str(path), *words, "-o", f"again{Path(path).suffix}", model=None)
    assert said.code == 0, said.err
    return said.paths[0].read_bytes()


@pytest.mark.parametrize("name", OWN)
def test_our_own_come_back_to_the_last_byte(studio, name):
    suffix = {"plain": ".jpg", "larger": ".webp"}.get(name, ".png")
    steps = [] if name == "sigmas" else ["--steps", "2"]
    said = studio(*OWN[name], *steps, "-o", f"{{index}}{suffix}")
    assert said.code == 0, said.err
    assert again(studio, said.paths[-1]) == said.paths[-1].read_bytes()


def test_our_own_of_sdxl_come_back(studio, tmp_path):
    save("sdxl", tmp_path / "xl")
    said = studio(PROMPT, "-s", "3", "--steps", "2", "-o", "x.png", model="xl")
    assert said.code == 0, said.err
    assert again(studio, "x.png") == Path("x.png").read_bytes()


# --- by Python


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
    assert not found.verify(image.resize((8, 8))).identical
    assert "of another size" in str(found.verify(image.resize((8, 8))))
    near = Image.fromarray(np.asarray(Image.open(apple)) ^ np.uint8(1))  # each level by one
    near.info = Image.open(apple).info
    verdict = recall(apple).verify(near)
    assert (verdict.identical, verdict.levels) == (False, 1)
    assert str(verdict).startswith(f"{apple}: differs, up to 1 of 255, 48.1 dB (as rounding does")
    other = diffusion.recall(record_of(apple, torch="0.1", steps=3)).verify(image)
    assert other.differs["torch"][0] == "0.1"


CHANGES = [
    ({"steps": 3}, ["steps 3 in place of 2"], {"steps": 3}),
    ({"steps": 2}, [], {"steps": 2}),
    ({"prompts": ("blue boat",)}, ["prompts blue boat in place of red apple"], {"prompts": ("blue boat",)}),
    ({"negative_prompt": ""}, ["negative_prompt nothing in place of boat"], {"negative_prompt": ""}),
    ({"sampler": "DPM++ 2M Karras"}, ["sampler DPM++ 2M Karras in place of ddim"], {"schedule": "karras"}),
    ({"sigmas": (5, 1)}, ["without steps 2", "without schedule trailing"], {"steps": 2, "schedule": None}),
    ({"guidance_scale": 1}, ["without negative_prompt boat"], {"negative_prompt": ""}),
    ({"num_images": 3}, [], {"num_images": 3, "seed": 3}),
    ({"hires": 2}, [], {"hires": 2}),
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


def test_loras_are_found_by_name_or_hash(apple, red, tmp_path):  # noqa: F811
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


def test_loras_of_the_prompt_are_compared(apple, red):  # noqa: F811
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


def test_a_picture_to_begin_from_is_the_same_one(tiny, apple, photo, tmp_path):  # noqa: F811
    begun = save_image(tiny(PROMPT, seed=3, steps=1, init_image=photo[0], mask=photo[1])[0], tmp_path / "sub/begun.png")
    assert recall(begun).settings.init_image == "photo.png"
    photo[0].rename(tmp_path / "sub/photo.png")
    assert recall(begun).settings.init_image == str(tmp_path / "sub/photo.png")
    Image.new("RGB", (21, 19)).save(tmp_path / "sub/photo.png")
    with pytest.raises(
        ValueError, match=r"drawn from a picture 'photo\.png' \([0-9a-f]{10}\), which is not here, and .*other"
    ):
        recall(begun)
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
    ({"mask": {"name": "x"}}, "which is not here: give mask"),
    ({"control": {"name": "canny", "hash": "12"}}, "its ControlNet 'canny' (12) is not here: give control"),
]


@pytest.mark.parametrize(("changes", "message"), DAMAGED, ids=lambda value: str(value)[:30])
def test_a_record_that_cannot_be_met_is_one_line(apple, changes, message):
    with pytest.raises(ValueError, match=r"changed\.png cannot be drawn again: ") as caught:
        recall(record_of(apple, **changes))
    assert message in str(caught.value)


def test_what_is_given_is_looked_for_where_it_is(apple, red, tmp_path):  # noqa: F811
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


# --- by the command line


def test_flags_and_prompts_stand_in_for_what_is_recorded(studio):
    studio(PROMPT, "-s", "3", "--steps", "2", "-n", "boat", "--clip-skip", "2", "-o", "x.png")
    said = studio("--from-image", "x.png", "blue boat", "--steps", "3", "--clip-skip", "1", "-o", "y.png", model=None)
    assert said.code == 0, said.err
    record, before = made("y.png"), made("x.png")
    assert (record["prompt"], record["steps"], "clip_skip" in record) == ("blue boat", 3, False)
    same = before.keys() - {"prompt", "steps", "clip_skip"}
    assert {name: record[name] for name in same} == {name: before[name] for name in same}
    assert "from x.png, as diffusion wrote it" in said.err
    assert "steps 3 in place of 2" in said.err
    plain = studio("blue boat", "-s", "3", "--steps", "3", "-n", "boat", "-o", "z.png", model="tiny")
    assert plain.paths[0].read_bytes() == Path("y.png").read_bytes()


def test_more_pictures_are_drawn_from_one_and_compared_too(studio):
    studio(PROMPT, "-s", "3", "--steps", "2", "--sampler", "DPM++ 2M Karras", "-o", "x.png")
    said = studio("--from-image", "x.png", "--num-images", "2", "-o", "{seed}.png", model=None)
    assert [path.name for path in said.paths] == ["3.png", "4.png"]
    assert Path("3.png").read_bytes() == Path("x.png").read_bytes()
    words = ("--from-image", "x.png", "-o", "t.png", "--compare", "steps=1,2")
    said = studio(*words, "sampler=ddim,euler", model=None)
    assert said.code == 0, said.err
    assert (made("t.png")["seed"], made("t.png")["schedule"]) == (3, "karras")
    said = studio(*words, "sampler=Euler,DPM++ 2M Exponential", model=None)
    assert said.code == 0, said.err
    assert "schedule" not in made("t.png")


def test_a_lora_of_another_name_is_found_by_its_hash_and_keeps_its_strength(studio, red):  # noqa: F811
    studio(PROMPT, "-s", "3", "--steps", "2", "--lora", f"{red}:0.5", "-o", "x.png")
    red.rename("blue.safetensors")
    said = studio("--from-image", "x.png", "--lora", "blue.safetensors", "--verify", model=None)
    assert (said.code, said.out.splitlines()[0][:16]) == (0, "x.png: identical")
    assert studio("--from-image", "x.png", "--lora", "blue.safetensors:0.25", "--verify", model=None).code == 1


def test_precision_and_device_are_the_recorded_ones_unless_given(apple):
    assert {"device": "cpu", "dtype": "float32"}.items() <= recall(apple).options.items()
    assert {"device": "cuda:1", "dtype": "bf16"}.items() <= recall(apple, device="cuda:1", dtype="bf16").options.items()
    assert recall(record_of(apple, device="cuda", dtype="float16")).options["device"] is None, "whichever is here"


def test_a_dry_run_says_where_it_comes_from(studio, tmp_path):
    studio(PROMPT, "-s", "3", "--steps", "2", "-o", "x.png")
    before = sorted(path.name for path in tmp_path.iterdir())
    said = studio("--from-image", "x.png", "--cfg", "2", "--dry-run", model=None)
    assert (said.code, said.out) == (0, "")
    assert "from x.png, as diffusion wrote it; guidance_scale 2.0 in place of 3.0" in said.err
    assert "would draw 1 picture, 16x16, with tiny" in said.err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_verify_draws_again_and_writes_nothing(studio, tmp_path, suffix):
    studio(PROMPT, "-s", "3", "--steps", "2", "-o", f"x{suffix}")
    before = sorted(path.name for path in tmp_path.iterdir())
    said = studio("--from-image", f"x{suffix}", "--verify", model=None)
    assert (said.code, said.out) == (0, f"x{suffix}: identical\n")
    said = studio("--from-image", f"x{suffix}", "--verify", "--steps", "3", model=None)
    assert said.code == 1
    assert said.out.startswith(f"x{suffix}: differs, up to ")
    assert said.out.endswith("(steps 2 -> 3)\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert studio("--from-image", f"x{suffix}", "--verify", "-o", f"y{suffix}", model=None).code == 0
    assert Path(f"y{suffix}").read_bytes() == Path(f"x{suffix}").read_bytes()


def test_verify_takes_several_and_speaks_in_events(studio):
    for seed in ("3", "4"):
        studio(PROMPT, "-s", seed, "--steps", "2", "-o", f"{seed}.png")
    record_of(Path("4.png"), torch="0.1", model_hash="0123456789")
    said = studio("--from-image", "3.png", "changed.png", "4.png", "--verify", "--json", model=None)
    assert said.code == 0
    verdicts = {event["path"]: event for event in said.events if event["event"] == "verified"}
    assert [event["identical"] for event in verdicts.values()] == [True, True, True]
    assert verdicts["3.png"] | {"differs": {}} == verdicts["3.png"]
    assert verdicts["3.png"]["decibels"] is None
    assert verdicts["changed.png"]["differs"].keys() == {"torch", "model_hash"}
    assert [event["message"] for event in said.events if event["event"] == "warning"] == [
        line.partition(": ")[2] for line in said.err.splitlines()
    ]
    assert "was drawn with 0123456789" in said.err
    changed = read_record("3.png").record | {"seed": 5}
    other = Image.open("3.png")
    other.info["diffusion"] = json.dumps(changed)
    save_image(other, "5.png")
    said = studio("--from-image", "3.png", "5.png", "--verify", "--quiet", model=None)
    assert (said.code, said.err) == (1, "")
    assert [line.split(",")[0] for line in said.out.splitlines()] == ["3.png: identical", "5.png: differs"]


def test_another_programs_picture_is_drawn_with_a_model_of_ours(studio, tmp_path):
    png(tmp_path / "x.png", parameters=NEWER.replace("64x64", "16x16"))
    said = studio("--from-image", "x.png", "-o", "y.png")
    assert said.code == 0, said.err
    assert "warning: x.png: recorded, and not done here: TI hashes me: 12ab" in said.err
    expected = {"sampler": "dpmpp_2m", "schedule": "sgm_uniform", "steps": 8, "seed": 3, "variation_seed": 7}
    assert {name: made("y.png")[name] for name in expected} == expected
    said = studio("--from-image", "x.png", "--verify")
    assert said.code == 1
    assert "program AUTOMATIC1111 -> diffusion" in said.out


WRONG = [
    (["--from-image"], "--from-image"),
    (["--from-image", "gone.png"], "gone.png: cannot be read as a picture"),
    (["--from-image", "a prompt"], "--from-image a prompt is no picture"),
    (["--from-image", "mask.png"], "mask.png says nothing of how it was made"),
    (["--verify", PROMPT], "give --from-image"),
    (["--from-image", "x.png", "--verify", "--num-images", "2"], "compares one picture, and 2"),
    (["--from-image", "x.png", "--verify", "--grid", "g.png"], "--grid has no place beside --verify"),
    (["--from-image", "x.png", "--prompts", "list.txt"], "--prompts has no place beside --from-image"),
    (["--from-image", "x.png", "-o", "x.png"], "--output x.png is from_image too"),
    (["--from-image", "x.png", "--mask", "mask.png"], "mask needs a picture to begin from"),
    (["--from-image", "x.png", "--sampler", "eulr"], "did you mean 'euler'"),
    (["--from-image", "x.png", "lms.png"], "unknown sampler 'lms', must be one of euler"),
    (["--from-image", "x.png", "gone2.png"], "its model 'gone' (0123456789) is not here: give model"),
]


@pytest.mark.parametrize(("words", "message"), WRONG, ids=lambda value: " ".join(value)[:40])
def test_what_cannot_be_drawn_again_is_one_line(studio, tmp_path, words, message):
    studio(PROMPT, "-s", "3", "--steps", "2", "-o", "x.png")
    record_of(tmp_path / "x.png", sampler="lms").rename(tmp_path / "lms.png")
    record_of(tmp_path / "x.png", model="gone", model_hash="0123456789").rename(tmp_path / "gone2.png")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    said = studio(*words, model=None)
    assert (said.code, said.out) == (2, "")
    assert said.err.count("\n") == 1
    assert message in said.err
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_it_is_refused_before_torch_is_loaded(studio):
    png(Path("x.png"), parameters=NEWER)
    code = (
        "import sys; from diffusion.cli.generate import run\n"
        "code = run(sys.argv[1:]); sys.exit(3 if 'torch' in sys.modules else code)"
    )
    done = process(code, "--from-image", "x.png")
    assert done.returncode == 2, done.stderr
    assert "its model 'm' (abc) is not here: give model" in done.stderr
