"""Metadata of other programs, as those write it: what is read, what it means here, what cannot be read."""

import json

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffusion import foreign
from diffusion.records import read_record, recall

PROMPT = "red apple"


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


# --- fixtures

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


# --- what is read, and what is not


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
    ({"sd_metadata": '{"image": 5}'}, "its 'sd-metadata' is damaged, or of a program that is not known"),
]


@pytest.mark.parametrize(("texts", "message"), UNREADABLE, ids=[str(number) for number in range(len(UNREADABLE))])
def test_what_cannot_be_read_is_one_line(draw, tmp_path, texts, message):
    path = png(tmp_path / "x.png", **texts)
    with pytest.raises(ValueError, match=r"x\.png") as caught:
        recall(path)
    assert message in str(caught.value)
