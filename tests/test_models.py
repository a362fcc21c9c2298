"""Networks, tokenizer and the model folder."""

import copy

import pytest
import torch

from diffusion import TextToImage
from diffusion.models import networks, text
from diffusion.models.compiled import Compiled
from diffusion.models.folder import Forward, load_model
from diffusion.models.group_norm import speed_up_group_norm
from diffusion.models.networks import wrapped_edges
from diffusion.models.packing import forget, pack, unpack
from diffusion.precision import compile_if_equal
from families import psnr

VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "mid_block_add_attention": False,
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_fast_group_norm_has_the_gradients_of_the_stock_one(layout):
    torch.manual_seed(0)
    stock = torch.nn.GroupNorm(3, 12).double()
    torch.nn.init.normal_(stock.weight)
    x = torch.randn(2, 12, 5, 7, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    upstream = torch.randn(2, 12, 5, 7, dtype=torch.float64)  # not channels-last: a layout that backward must bear
    expected = torch.autograd.grad(stock(x), [x, stock.weight, stock.bias], upstream)
    reference = stock(x).detach()
    speed_up_group_norm(stock)
    y = stock(x)
    assert torch.allclose(y, reference, atol=1e-12)
    for ours, theirs in zip(torch.autograd.grad(y, [x, stock.weight, stock.bias], upstream), expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)  # the sums over space are float32


@pytest.mark.parametrize("right", [True, False])
def test_a_compiled_network_must_prove_itself(monkeypatch, right):
    """The compiler is played by one that is right, or that scales the output."""
    network, x = torch.nn.Linear(3, 2), torch.randn(4, 3)
    factor = 1.0 if right else 1.5

    def compile(self):
        self._compiled_call_impl = lambda x: factor * torch.nn.functional.linear(x, self.weight, self.bias)

    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    refused = compile_if_equal(network, lambda: network(x).square().mean())
    assert (refused is None) == right
    assert (network._compiled_call_impl is not None) == right


def test_a_compiler_that_fails_is_done_without(monkeypatch):
    network, x = torch.nn.Linear(3, 2), torch.randn(4, 3)

    def broken(*_):
        raise RuntimeError("no C++ compiler\nwith a long trace")

    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: setattr(self, "_compiled_call_impl", broken))
    refused = compile_if_equal(network, lambda: network(x).square().mean())
    assert refused == "torch.compile failed (no C++ compiler): training goes on uncompiled"
    assert network(x).shape == (4, 2)


def test_normalising_latents_changes_no_reconstruction():
    torch.manual_seed(0)
    vae = networks.build_autoencoder(VAE).double().eval()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        before = vae.encode(x).latent_dist
        decoded = vae.decode(before.mean).sample
        mean, std = torch.randn(4).double(), torch.rand(4).double() + 0.5
        networks.normalize_latents(vae, mean, std)
        after = vae.encode(x).latent_dist
        assert torch.allclose(after.mean, (before.mean - mean.view(-1, 1, 1)) / std.view(-1, 1, 1))
        assert torch.allclose(after.std, before.std / std.view(-1, 1, 1))
        assert torch.allclose(vae.decode(after.mean).sample, decoded)
    assert vae.config.scaling_factor == 1.0


def test_a_mistyped_argument_is_refused():
    with pytest.raises(ValueError, match="did you mean 'block_out_channels'"):
        networks.build_autoencoder(VAE | {"block_out_channel": [8]})


def test_the_tokenizer_spells_everything_and_survives_its_files(tmp_path):
    tokenizer = text.train_tokenizer(["red apple", "green apple", "red car"] * 3, 530, 12)
    text.save_tokenizer(tokenizer, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} >= {"vocab.json", "merges.txt", "tokenizer_config.json"}
    again = text.load_tokenizer(tmp_path)
    for caption in ("Red apple", "ÿ ☂ 猫", ""):
        assert again(caption).input_ids == tokenizer(caption).input_ids
        assert again.unk_token_id not in again(caption).input_ids[1:-1]
    assert len(tokenizer) <= 530
    assert len(tokenizer("apple").input_ids) < len(tokenizer("zebra").input_ids)
    ids = text.tokenize(text.Tokenizers([again]), ["red apple", ""])["tokens"]
    assert ids.shape == (2, 12)


def test_the_same_captions_give_the_same_vocabulary():
    captions = [f"{a} {b}" for a in ("red", "blue", "green", "pale") for b in ("cat", "car", "boat", "bear", "tree")]
    vocabularies = [text.train_tokenizer(captions, 560, 12).get_vocab() for _ in range(8)]
    assert all(vocabulary == vocabularies[0] for vocabulary in vocabularies)


def test_a_prompt_that_is_too_long_is_refused_and_not_cut():
    tokenizer = text.train_tokenizer(["red apple"] * 3, 530, 12)
    with pytest.raises(ValueError, match=r"30 tokens long, but this text encoder reads 10"):
        text.tokenize(text.Tokenizers([tokenizer]), ["xyz" * 10])


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "cosine"])
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_the_forward_process_survives_the_stock_format(beta_schedule, zero_terminal_snr):
    from diffusers import DDIMScheduler

    forward = Forward(beta_schedule=beta_schedule, zero_terminal_snr=zero_terminal_snr, prediction="v_prediction")
    assert Forward.from_diffusers(forward.to_diffusers()) == forward
    stock = DDIMScheduler.from_config(forward.to_diffusers())
    alpha, _ = forward.schedule().level_at(torch.arange(1000))
    assert torch.allclose(alpha.float() ** 2, stock.alphas_cumprod, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_put_out_what_the_others_do(tiny_model, dtype):
    model = load_model(tiny_model, dtype=dtype)
    unet = model.unet.to(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(shape, generator=generator).to(dtype) for shape in ((2, 4, 8, 8), (2, 24, 32))]
    with torch.inference_mode():
        plain = unet(given[0], 500, given[1]).sample
        assert pack(unet)
        packed = unet(given[0], 500, given[1]).sample
        other = unet(given[0][:1], 500, given[1][:1]).sample
    assert torch.allclose(packed.float(), plain.float(), rtol=1e-4, atol=1e-5 if dtype == torch.float32 else 1e-2)
    assert torch.allclose(other.float(), plain[:1].float(), rtol=1e-4, atol=1e-4 if dtype == torch.float32 else 2e-2)
    used = [layer.forward.weight for layer in unet.modules() if isinstance(layer, torch.nn.Conv2d)]
    assert used, "there are convolutions"
    assert all(weight is not None for weight in used), "and each was packed"
    unpack(unet)
    assert not any("forward" in layer.__dict__ for layer in unet.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (torch.nn.Linear(256, 64), (1, 256)),
        (torch.nn.Linear(768, 320), (1, 1, 768)),
        (torch.nn.Linear(320, 640), (1, 77, 320)),
        (torch.nn.Conv2d(64, 96, 3, padding=1), (1, 64, 16, 16)),
        (torch.nn.Conv2d(320, 64, 1), (1, 320, 8, 8)),
    ],
)
def test_a_packed_layer_sums_the_same_way_whoever_is_in_the_batch_or_came_before(layer, shape, dtype):
    """A matrix and a single vector go to another kernel, which rounds otherwise than that of many rows."""
    torch.manual_seed(0)
    found = dict[int, list[torch.Tensor]]()
    x = torch.randn(5, *shape[1:]).to(dtype)
    for first in (1, 2, 5):  # the size of the batch that the weights are packed at
        network = torch.nn.Sequential(copy.deepcopy(layer)).to(dtype, memory_format=torch.channels_last)
        assert pack(network)
        with torch.inference_mode():
            network(x[:first])
            found[first] = [network(x[:1]), network(x[:2])[:1], network(x)[:1], network(x[:1])]
    one, *others = [value for values in found.values() for value in values]
    assert one.shape == (1, *layer(torch.zeros(shape)).shape[1:])
    assert all(torch.equal(one, other) for other in others)
    assert torch.allclose(one.float(), layer(x[:1].float()), atol=1e-5 if dtype == torch.float32 else 0.03)


def test_a_packed_layer_takes_one_vector():
    layer, x = torch.nn.Linear(8, 4), torch.ones(8)
    with torch.inference_mode():
        plain = layer(x)
        assert pack(torch.nn.Sequential(layer))
        assert torch.equal(layer(x), plain)


def test_packed_weights_follow_their_own_and_leave_gradients_alone():
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Conv2d(8, 16, 3, padding=1))
    x = torch.randn(2, 8, 6, 6)
    pack(layer)
    with torch.inference_mode():
        before = layer(x).clone()
    with torch.no_grad():
        layer[0].weight.mul_(2)
        layer[0].bias.mul_(2)
        assert torch.allclose(layer(x), 2 * before, rtol=1e-5, atol=1e-5)
    layer(x).sum().backward()
    assert layer[0].weight.grad is not None
    with wrapped_edges([layer], "x"), torch.inference_mode():
        rolled = layer(x.roll(2, 3)).roll(-2, 3)
        assert torch.allclose(rolled, layer(x), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(rolled, 2 * before, atol=1e-3)


def test_weights_of_inference_mode_are_packed_anew_when_that_is_said():
    with torch.inference_mode():
        layer = torch.nn.Sequential(torch.nn.Linear(8, 4))
        pack(layer)
        x = torch.ones(1, 8)
        before = layer(x).clone()
        layer[0].weight.mul_(2)
        layer[0].bias.mul_(2)
        forget(layer, {id(layer[0].weight)})
        assert torch.allclose(layer(x), 2 * before)


@pytest.mark.parametrize("right", [True, False])
def test_a_compiled_unet_is_used_only_if_it_proves_equal(monkeypatch, right):
    """With a compiler that is played: whether it is believed is ours."""
    calls = []

    class Network(torch.nn.Module):
        device, dtype = torch.device("cpu"), torch.float32

        def forward(self, x, t, encoder_hidden_states):
            calls.append("eager")
            return (x * 2,)

    def compiler(network, **_):
        def fast(x, t, encoder_hidden_states):
            calls.append("fast")
            return (x * (2 if right else 2.1),)

        return fast

    monkeypatch.setattr(torch, "compile", compiler)
    network = Network()
    made = Compiled(network)
    x, context = torch.ones(1, 4, 2, 2), torch.ones(1, 3, 8)
    assert torch.equal(network(x, 1, encoder_hidden_states=context)[0], x * 2)
    calls.clear()
    assert torch.equal(network(x, 1, encoder_hidden_states=context)[0], x * 2)
    assert calls == (["fast"] if right else ["eager"])
    assert ("s to compile" in made.report) == right
    assert ("is not used" in made.report) != right


@pytest.mark.slow
def test_the_shipped_model_compiles_to_the_same_picture(tmp_path):
    plain = TextToImage.load("emoji", "cpu", "fp32")("panda", seed=3, steps=2)[0]
    fast = TextToImage.load("emoji", "cpu", "fp32", compile=True)
    assert psnr(fast("panda", seed=3, steps=2)[0], plain) > 50
    assert all(fast.model.compiled.trusted.values())
