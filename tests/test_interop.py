"""Single files in the original format, Hub ids, and ``diffusion export``; the stock library reads what is written."""

import gzip
import json
import shutil
import socket
import zipfile

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.loaders.single_file_utils import infer_diffusers_model_type
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusion import TextToImage, interop
from diffusion.cli import main as cli
from diffusion.models import lora, original
from diffusion.models.clip_tokenizer import MERGES, clip_tokenizer
from diffusion.models.folder import load_model
from diffusion.models.hub import find_on_hub
from families import FAMILIES, draw, psnr, save, stock

COUNTS = {  # parameters of the networks that everyone knows
    "sd1": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sd2": {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
    "sdxl": {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    },
}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """Of every family a tiny model, the same as one file, and a LoRA for it. The stock library tells XL's two text
    encoders apart by their widths."""
    shelf = tmp_path_factory.mktemp("interop")
    for family in FAMILIES:
        save(family, shelf / family, second_width=48)
        interop.save_single_file(load_model(shelf / family), shelf / f"{family}.safetensors")
        _save_lora(load_model(shelf / family), shelf / f"{family}-lora")
    return shelf


def _save_lora(model, folder):
    """A LoRA of every network, with other ranks and strengths in the text encoders, that changes pictures."""
    torch.manual_seed(3)
    networks = {name: network for name, network in model.networks.items() if name != "vae"}
    for name, network in networks.items():
        targets = lora.EVERYTHING if name == "unet" else lora.TEXT_TARGETS
        lora.add(network, targets, 4 if name == "unet" else 2, 2.0 if name == "unet" else 3.0)
        for key, weight in network.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(weight, std=0.3)
    lora.save(networks, folder)


def picture(model, prompt="red apple", **load):
    drawer = TextToImage.load(model, **load) if load else TextToImage(_read(model))
    return drawer(prompt, seed=7, steps=4, guidance_scale=5.0, width=32, height=32)[0]


def _read(path):
    return interop.load_single_file(path) if path.is_file() else load_model(path)


def same_weights(one, other):
    assert one.networks.keys() == other.networks.keys()
    for name, network in one.networks.items():
        ours, theirs = network.state_dict(), other.networks[name].state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name


# --- single files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_single_file_is_the_folder(shelf, family):
    folder, file = load_model(shelf / family), interop.load_single_file(shelf / f"{family}.safetensors")
    same_weights(folder, file)
    assert file.path == shelf / f"{family}.safetensors"
    assert (file.forward, file.recipe, file.zero_empty) == (folder.forward, folder.recipe, folder.zero_empty)
    assert [t.get_vocab() for t in file.tokenizers] == [t.get_vocab() for t in folder.tokenizers]
    assert psnr(picture(shelf / f"{family}.safetensors"), picture(shelf / family)) > 60, (
        "weights lie elsewhere in memory"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stock_library_draws_the_same_from_a_single_file(shelf, family):
    cls = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    file = str(shelf / f"{family}.safetensors")
    theirs = cls.from_single_file(file, config=str(shelf / family), local_files_only=True)
    settings = {"timestep_spacing": "trailing", "set_alpha_to_one": True}
    theirs.scheduler = DDIMScheduler.from_config(theirs.scheduler.config, **settings)
    theirs.set_progress_bar_config(disable=True)
    assert psnr(picture(shelf / family), draw(theirs, "red apple", 7)) > 60


@pytest.mark.parametrize("kept", [torch.float16, torch.bfloat16])
def test_half_precision_files_load_in_the_dtype_that_is_asked_for(shelf, tmp_path, kept):
    interop.save_single_file(load_model(shelf / "sd1"), tmp_path / "half.safetensors", kept)
    assert {t.dtype for t in load_file(tmp_path / "half.safetensors").values()} == {kept}
    for dtype in (torch.float32, torch.bfloat16):
        model = interop.load_single_file(tmp_path / "half.safetensors", dtype=dtype)
        found = {p.dtype for network in model.networks.values() for p in network.parameters()}
        assert found == {dtype}
    assert psnr(picture(tmp_path / "half.safetensors"), picture(shelf / "sd1")) > 25
    assert [file.name for file in tmp_path.iterdir()] == ["half.safetensors"], "nothing half-written is left"


def test_the_header_tells_other_programs_what_it_is(shelf):
    for family in FAMILIES:
        with safe_open(shelf / f"{family}.safetensors", "pt") as file:
            header, keys = file.metadata(), set(file.keys())
        assert header["modelspec.title"] == family
        assert header["modelspec.architecture"] == original.FAMILIES[family].architecture
        assert header["modelspec.prediction_type"] == ("v" if family == "sd2" else "epsilon")
        assert ({"v_pred", "ztsnr"} <= keys) == (family == "sd2")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stock_networks_have_the_known_parameter_counts(family):
    networks = original.outline(original.FAMILIES[family].configs)
    assert {name: sum(p.numel() for p in one.parameters()) for name, one in networks.items()} == COUNTS[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_of_a_full_model_has_a_name_in_the_original_format(family):
    """There and back by diffusers' converters, each weight filled with its own number (one element, strided)."""
    networks = original.outline(original.FAMILIES[family].configs)
    numbers = {}
    for name, network in networks.items():
        shapes = {key: tensor.shape for key, tensor in network.state_dict().items()}
        numbers[name] = {key: torch.tensor(float(n)).half() for n, key in enumerate(shapes)}
        network.load_state_dict({key: numbers[name][key].expand(shapes[key]) for key in shapes}, assign=True)
    there = original.to_original(networks)
    assert infer_diffusers_model_type(there) == {"sd1": "v1", "sd2": "v2", "sdxl": "xl_base"}[family]
    assert original.identify({key: tuple(tensor.shape) for key, tensor in there.items()}) == family
    back = original.from_original(there, family, networks)
    for name, weights in back.items():
        assert weights.keys() == numbers[name].keys()
        for key, tensor in weights.items():
            ends = tensor[(0,) * tensor.ndim], tensor[(-1,) * tensor.ndim]
            assert ends == (numbers[name][key],) * 2, key


def test_keys_that_are_known_from_files_in_the_wild():
    keys = {family: original.to_original(original.outline(one.configs)) for family, one in original.FAMILIES.items()}
    for family, key, shape in (
        ("sd1", "model.diffusion_model.input_blocks.3.0.op.weight", (320, 320, 3, 3)),
        ("sd1", "model.diffusion_model.output_blocks.2.1.conv.weight", (1280, 1280, 3, 3)),
        ("sd1", "model.diffusion_model.output_blocks.5.2.conv.weight", (1280, 1280, 3, 3)),
        ("sd1", "model.diffusion_model.output_blocks.11.0.skip_connection.weight", (320, 640, 1, 1)),
        ("sd1", "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight", (1280, 768)),
        ("sd1", "first_stage_model.decoder.up.3.block.0.conv1.weight", (512, 512, 3, 3)),
        ("sd1", "first_stage_model.decoder.up.1.block.0.nin_shortcut.weight", (256, 512, 1, 1)),
        ("sd1", "first_stage_model.encoder.mid.attn_1.q.weight", (512, 512, 1, 1)),
        ("sd1", "cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc1.weight", (3072, 768)),
        ("sd2", "model.diffusion_model.input_blocks.1.1.proj_in.weight", (320, 320)),
        ("sd2", "cond_stage_model.model.transformer.resblocks.22.attn.in_proj_weight", (3072, 1024)),
        ("sd2", "cond_stage_model.model.positional_embedding", (77, 1024)),
        ("sdxl", "model.diffusion_model.label_emb.0.0.weight", (1280, 2816)),
        ("sdxl", "model.diffusion_model.input_blocks.8.1.transformer_blocks.9.attn1.to_q.weight", (1280, 1280)),
        ("sdxl", "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight", (768,)),
        ("sdxl", "conditioner.embedders.1.model.transformer.resblocks.31.mlp.c_proj.bias", (1280,)),
        ("sdxl", "conditioner.embedders.1.model.text_projection", (1280, 1280)),
    ):
        assert tuple(keys[family][key].shape) == shape, key
    assert sum(key.startswith(original.UNET) for key in keys["sd1"]) == 686
    assert sum(key.startswith(original.UNET) for key in keys["sdxl"]) == 1680


@pytest.fixture
def narrow(monkeypatch, shelf):
    """The stock families made as narrow as the tiny models, and those as files that say nothing of themselves."""
    for family in FAMILIES:
        with safe_open(shelf / f"{family}.safetensors", "pt") as file:
            facts = json.loads(file.metadata()[interop.FACTS])
        stocked = original.FAMILIES[family]
        monkeypatch.setitem(original.FAMILIES, family, original.Family(
            stocked.title, stocked.architecture, stocked.texts, stocked.side, facts["networks"]
        ))  # fmt: skip

    def plain(family, file, header=None, **more):
        kept = {k: t for k, t in load_file(shelf / f"{family}.safetensors").items() if k not in ("v_pred", "ztsnr")}
        save_file(kept | more, file, metadata=header)
        return file

    return plain


def test_a_file_without_our_header_is_a_stock_model(narrow, shelf, tmp_path):
    for family, side, pads in (("sd1", 512, [49407]), ("sd2", 768, [0]), ("sdxl", 1024, [49407, 0])):
        more = {"model_ema.decay": torch.zeros(()), "alphas_cumprod": torch.zeros(1000)}
        model = interop.load_single_file(narrow(family, tmp_path / f"{family}.safetensors", **more))
        same_weights(model, load_model(shelf / family))
        assert (model.recipe.width, model.recipe.height) == (side, side)
        assert [tokenizer.pad_token_id for tokenizer in model.tokenizers] == pads
        assert model.prediction == ("v_prediction" if family == "sd2" else "epsilon")
        assert model.forward.beta_end == 0.012
        assert model.zero_empty == (family == "sdxl")


def test_older_text_encoders_lack_a_word_in_their_names(narrow, shelf, tmp_path):
    file = narrow("sd1", tmp_path / "old.safetensors")
    old = {key.replace("transformer.text_model.", "transformer."): t for key, t in load_file(file).items()}
    old["cond_stage_model.transformer.embeddings.position_ids"] = torch.arange(24)[None]
    save_file(old, file)
    same_weights(interop.load_single_file(file), load_model(shelf / "sd1"))


def test_files_of_2_hold_what_nobody_asks_for(narrow, shelf, tmp_path):
    prefix = "cond_stage_model.model."
    last = {"ln_1.weight": (32,), "attn.in_proj_weight": (96, 32), "mlp.c_fc.weight": (64, 32)}
    more = {f"{prefix}transformer.resblocks.23.{key}": torch.zeros(shape) for key, shape in last.items()}
    more |= {f"{prefix}logit_scale": torch.zeros(()), f"{prefix}text_projection": torch.zeros(32, 32)}
    file = narrow("sd2", tmp_path / "2.safetensors", **more)
    same_weights(interop.load_single_file(file), load_model(shelf / "sd2"))
    moved = {key.replace(prefix, "conditioner.embedders.0.model."): t for key, t in load_file(file).items()}
    save_file(moved, file)
    same_weights(interop.load_single_file(file), load_model(shelf / "sd2"))


def test_a_weight_too_many_in_the_network_is_an_error(narrow, tmp_path):
    file = narrow("sd1", tmp_path / "more.safetensors", **{"model.diffusion_model.motion.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="its U-Net has 1 weights more"):
        interop.load_single_file(file)


@pytest.mark.parametrize(
    ("family", "header", "more", "expected"),
    [
        ("sd2", {}, {}, ("v_prediction", False, 768)),
        ("sd2", {}, {"global_step": torch.tensor(875000)}, ("epsilon", False, 512)),
        ("sd2", {"modelspec.prediction_type": "epsilon"}, {}, ("epsilon", False, 512)),
        ("sdxl", {"modelspec.prediction_type": "v"}, {}, ("v_prediction", False, 1024)),
        ("sdxl", {}, {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, ("v_prediction", True, 1024)),
        ("sd1", {}, {"global_step": torch.tensor(470000)}, ("epsilon", False, 512)),
    ],
)
def test_what_a_file_predicts_is_what_it_says(narrow, tmp_path, family, header, more, expected):
    model = interop.load_single_file(narrow(family, tmp_path / "m.safetensors", header, **more))
    assert (model.prediction, model.forward.zero_terminal_snr, model.recipe.width) == expected
    other = "v_prediction" if model.prediction == "epsilon" else "epsilon"
    assert interop.load_single_file(tmp_path / "m.safetensors", prediction=other).prediction == other


def _file(path, *keys, shape=(1, 4)):
    save_file({key: torch.zeros(shape) for key in keys}, path)


FIRST = "model.diffusion_model.input_blocks.0.0.weight"


@pytest.mark.parametrize(
    ("keys", "channels", "message"),
    [
        (["lora_unet_mid_block_attentions_0_proj_in.lora_up.weight"], 4, "a LoRA: put it on a model with --lora"),
        (["model.diffusion_model.double_blocks.0.img_attn.qkv.weight"], 4, "Flux"),
        (["first_stage_model.decoder.conv_in.weight"], 4, "an autoencoder alone"),
        (["down_blocks.0.resnets.0.conv1.weight"], 4, "a part of a model folder"),
        (["emb_params"], 4, "a learnt word"),
        (["x"], 4, "no model known here"),
        ([FIRST], 9, "9 input channels (inpainting)"),
        ([FIRST, "edm_mean"], 4, "another forward process"),
        (
            [FIRST, "conditioner.embedders.0.model.x", "model.diffusion_model.label_emb.0.0.weight"],
            4,
            "the refiner of Stable Diffusion XL",
        ),
        ([FIRST], 4, "without its text encoder"),
        ([FIRST, "cond_stage_model.transformer.text_model.final_layer_norm.bias"], 4, "without its autoencoder"),
        (
            [FIRST, "cond_stage_model.transformer.x", "first_stage_model.x"],
            4,
            "weights of its unet are not those of the stock model",
        ),
    ],
)
def test_another_file_is_refused_by_what_it_holds(tmp_path, keys, channels, message):
    _file(tmp_path / "other.safetensors", *keys, shape=(1, channels))
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is looked at below
        interop.load_single_file(tmp_path / "other.safetensors")
    assert message in str(error.value)
    assert str(tmp_path / "other.safetensors") in str(error.value)
    assert "\n" not in str(error.value)


def test_a_pickle_is_refused_whatever_its_name(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "zip.safetensors")
    assert zipfile.is_zipfile(tmp_path / "zip.safetensors")
    (tmp_path / "noise.safetensors").write_bytes(b"not at all")
    (tmp_path / "cut.safetensors").write_bytes((8).to_bytes(8, "little") + b"{")
    for name, message in (("zip", "pickled checkpoint"), ("noise", "not a safetensors file"), ("cut", "not a safe")):
        with pytest.raises(ValueError, match=message) as error:
            interop.load_single_file(tmp_path / f"{name}.safetensors")
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="no such file"):
        interop.load_single_file(tmp_path / "none.safetensors")


def test_a_damaged_description_is_refused(shelf, tmp_path):
    tensors = load_file(shelf / "sd1.safetensors")
    for said in ("{", "{}", "[]"):
        save_file(tensors, tmp_path / "m.safetensors", metadata={interop.FACTS: said})
        with pytest.raises(ValueError, match=r"m\.safetensors: "):
            interop.load_single_file(tmp_path / "m.safetensors")


def test_a_model_of_our_own_kind_has_no_single_file(tmp_path, capsys):
    assert cli(["export", "emoji", str(tmp_path / "emoji.safetensors")]) == 2
    assert "no place for addition_embed_type 'text'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# --- the tokenizer ----------------------------------------------------------------------------------------------------


def test_the_tokenizer_is_clips():
    tokenizer = clip_tokenizer()
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert len(tokenizer) == 49408
    assert tokenizer.model_max_length == 77
    assert tokenizer("a", padding="max_length").input_ids[2:4] == [49407, 49407]
    assert clip_tokenizer("!")("a", padding="max_length").input_ids[2:4] == [49407, 0]
    text = gzip.decompress(MERGES.read_bytes()).decode()
    assert text.count("\n") == 48_894
    assert gzip.compress(text.encode(), 9, mtime=0)[4:8] == MERGES.read_bytes()[4:8], "without a date"


def test_clips_tokenizer_is_not_repeated_in_every_file(shelf):
    assert interop._pack(clip_tokenizer("!")) == {"pad": "!"}
    taught = clip_tokenizer()
    taught.add_tokens(["<zib>"])
    again = interop._unpack(interop._pack(taught))
    assert again("a <zib>").input_ids == taught("a <zib>").input_ids == [49406, 320, 49408, 49407]


# --- the Hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(monkeypatch, tmp_path, shelf):
    """A cache that holds ``org/tiny``, and no network."""

    def refuse(*_):
        raise AssertionError("the network was asked")

    commit = "0" * 40
    repo = tmp_path / "models--org--tiny"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs/main").write_text(commit)
    shutil.copytree(shelf / "sd1", repo / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return repo / "snapshots" / commit


@pytest.mark.parametrize("offline", [False, True])
def test_a_cached_model_is_found_without_the_network(cache, offline, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    folder = find_on_hub("org/tiny", offline=offline)
    assert folder == cache
    assert load_model(folder).recipe.width == 32


def test_what_is_not_cached_is_told_in_one_line(cache, monkeypatch):
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=r"^org/other is not in the local cache, .*$"):
        find_on_hub("org/other", offline=True)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "1")
            with pytest.raises(ValueError, match="is not in the local cache"):
                find_on_hub("org/other")
    with pytest.raises(ValueError, match=r"^org/other cannot be had from the Hugging Face Hub: .*$"):
        find_on_hub("org/other")
    (cache / "vae/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match="in the local cache without vae/diffusion_pytorch_model"):
        find_on_hub("org/tiny", offline=True)


def test_only_full_safetensors_are_downloaded(cache, monkeypatch, shelf, tmp_path):
    from fnmatch import fnmatch

    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    asked = []

    def download(name, *, allow_patterns, ignore_patterns, local_files_only):
        asked.append((name, local_files_only))
        if local_files_only:
            raise OSError("nothing there")
        files = {
            "model_index.json": True,
            "unet/diffusion_pytorch_model.safetensors": True,
            "unet/diffusion_pytorch_model-00001-of-00002.safetensors": True,
            "unet/diffusion_pytorch_model.safetensors.index.json": True,
            "unet/diffusion_pytorch_model.fp16.safetensors": False,
            "unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors": False,
            "unet/diffusion_pytorch_model.safetensors.index.fp16.json": False,
            "unet/diffusion_pytorch_model.non_ema.safetensors": False,
            "unet/diffusion_pytorch_model.bin": False,
            "unet/model.onnx": False,
            "text_encoder/model.safetensors": True,
            "tokenizer/merges.txt": True,
            "safety_checker/model.safetensors": False,
            "sd-v1-5.safetensors": False,
        }
        for file, wanted in files.items():
            taken = any(fnmatch(file, one) for one in allow_patterns) and not fnmatch(file, ignore_patterns)
            assert taken == wanted, file
        return str(shelf / "sd1")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert find_on_hub("org/new") == shelf / "sd1"
    assert asked == [("org/new", True), ("org/new", False)]


# --- export -----------------------------------------------------------------------------------------------------------


def exported(capsys, *words):
    assert cli(["export", *map(str, words)]) == 0
    done = capsys.readouterr()
    assert done.out == f"{words[1]}\n"
    return words[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_lora_draws_what_the_model_with_it_draws(shelf, tmp_path, capsys, family):
    adapter = shelf / f"{family}-lora"
    beside = picture(shelf / family, loras={str(adapter): 0.7})
    assert psnr(beside, picture(shelf / family)) < 35, "it changes pictures"
    folder = exported(capsys, shelf / family, tmp_path / "merged", "--lora", f"{adapter}:0.7")
    assert psnr(picture(folder), beside) > 60
    assert psnr(draw(stock(folder), "red apple", 7), beside) > 60
    file = exported(capsys, shelf / f"{family}.safetensors", tmp_path / "m.safetensors", "-l", f"{adapter}:0.7")
    assert psnr(picture(file), beside) > 60


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_is_rewritten_for_kohya_and_back(shelf, tmp_path, capsys, family):
    adapter, model = shelf / f"{family}-lora", shelf / family
    beside = picture(model, loras={str(adapter): 1.0})
    kohya = exported(capsys, model, tmp_path / "k.safetensors", "--lora", adapter, "--format", "kohya")
    keys = load_file(kohya).keys()
    texts = {"lora_te1_text_model", "lora_te2_text_model"} if family == "sdxl" else {"lora_te_text_model"}
    blocks = ("input_blocks", "middle_block", "output_blocks") if family == "sdxl" else ("down", "mid", "up")
    prefixes = {*(f"lora_unet_{block}" for block in blocks), *texts}
    assert all(any(key.startswith(prefix) for key in keys) for prefix in prefixes)
    assert {key.split(".", 1)[1] for key in keys} == {"lora_down.weight", "lora_up.weight", "alpha"}
    assert picture(model, loras={str(kohya): 1.0}).tobytes() == beside.tobytes()
    single = shelf / f"{family}.safetensors"
    back = exported(capsys, single, tmp_path / "d.safetensors", "--lora", kohya, "--format", "diffusers")
    assert picture(model, loras={str(back): 1.0}).tobytes() == beside.tobytes()
    for file in (kohya, back):
        theirs = stock(model)
        theirs.load_lora_weights(str(file))
        assert psnr(draw(theirs, "red apple", 7), beside) > 45


def test_a_rewritten_lora_keeps_the_strength_of_every_layer(shelf, tmp_path, capsys):
    networks = {"unet": load_model(shelf / "sd1").unet}
    layers = ("conv_in", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    tensors = {}
    for rank, layer in zip((2, 3), layers, strict=True):
        weight = networks["unet"].get_submodule(layer).weight
        tensors[f"unet.{layer}.lora_A.weight"] = torch.randn(rank, *weight.shape[1:])
        tensors[f"unet.{layer}.lora_B.weight"] = torch.randn(len(weight), rank, *[1] * (weight.ndim - 2))
    save_file(tensors, tmp_path / "plain.safetensors")
    plain = lora.read(tmp_path / "plain.safetensors", networks)
    for form in ("kohya", "diffusers"):
        file = tmp_path / f"{form}.safetensors"
        exported(capsys, shelf / "sd1", file, "--lora", tmp_path / "plain.safetensors", "--format", form)
        again = lora.read(file, networks)
        for layer in layers:
            zero = torch.zeros_like(networks["unet"].get_submodule(layer).weight)
            deltas = (one.networks["unet"][layer].merged(zero, 1.0) for one in (plain, again))
            assert torch.equal(*deltas)
    half = tmp_path / "half.safetensors"
    exported(capsys, shelf / "sd1", half, "-l", tmp_path / "plain.safetensors", "--format", "kohya", "--dtype", "fp16")
    assert {t.dtype for key, t in load_file(half).items() if not key.endswith("alpha")} == {torch.float16}


def test_a_folder_of_adapters_is_exported_with_its_base(shelf, tmp_path, capsys):
    adapter = tmp_path / "style"
    shutil.copytree(shelf / "sd1-lora", adapter)
    recipe = {"base": str(shelf / "sd1"), "width": 32, "height": 32, "steps": 4}
    (adapter / "recipe.json").write_text(json.dumps(recipe))
    folder = exported(capsys, adapter, tmp_path / "alone")
    assert picture(folder).tobytes() == picture(adapter).tobytes()
    assert json.loads((folder / "recipe.json").read_text())["base"] == "", "it stands alone"
    exported(capsys, adapter, tmp_path / "k.safetensors", "--format", "kohya")
    assert picture(shelf / "sd1", loras={str(tmp_path / "k.safetensors"): 1.0}).tobytes() == picture(folder).tobytes()


def test_exported_halves_are_stored_so(shelf, tmp_path, capsys):
    folder = exported(capsys, shelf / "sd1", tmp_path / "half", "--dtype", "fp16")
    assert {t.dtype for t in load_file(folder / "unet/diffusion_pytorch_model.safetensors").values()} == {torch.float16}


def test_wrong_exports_are_refused_in_one_line(shelf, tmp_path, capsys):
    model, adapter = str(shelf / "sd1"), str(shelf / "sd1-lora")
    (tmp_path / "there").mkdir()
    (tmp_path / "there.safetensors").write_bytes(b"")
    before = sorted(tmp_path.rglob("*"))
    file = str(tmp_path / "x.safetensors")
    for words, message in (
        ([], "give a MODEL and an OUTPUT"),
        ([model, str(tmp_path / "there")], "exists already, and nothing is overwritten"),
        ([model, str(tmp_path / "there.safetensors")], "exists already"),
        ([model, file, "--format", "ckpt"], "unknown format 'ckpt'"),
        ([model, file, "--format", "folder"], "drop the .safetensors"),
        ([model, str(tmp_path / "x"), "--format", "single-file"], "end it in .safetensors"),
        ([model, file, "--format", "kohya"], "one LoRA is rewritten at a time, not 0"),
        ([model, file, "--format", "kohya", "--lora", f"{adapter}:0.5"], "without a weight"),
        ([model, file, "--lora", "nowhere"], "no LoRA at nowhere"),
        ([model, file, "--dtype", "int8"], "unknown dtype 'int8'"),
        ([str(shelf / "sdxl"), file, "--lora", adapter], "another family of models"),
        ([str(shelf / "sdxl"), file, "--format", "kohya", "--lora", adapter], "another family of models"),
        (["nowhere", file], "'nowhere' not found"),
        ([model, file, "--colour"], "unknown flag '--colour'"),
    ):
        assert cli(["export", *words]) == 2, words
        told = capsys.readouterr()
        assert message in told.err, told.err
        assert told.err.count("\n") == 1
        assert not told.out
    assert sorted(tmp_path.rglob("*")) == before


def test_export_help_says_what_the_formats_are(capsys):
    assert cli(["export", "--help"]) == 0
    assert "single-file  a checkpoint in the original format" in capsys.readouterr().out
