"""What makes it fast, as far as a test can hold it without a clock: what is not imported, which settings are enough."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.measure import Contest, Timing, contest
from benchmarks.scaling import feed
from benchmarks.table import Row, render
from benchmarks.training import clocked
from commands import environment
from diffusion.cli import main
from diffusion.tuning import Trial, first_as_good
from test_other_commands import labelled  # noqa: F401 - a fixture

ROOT = Path(__file__).parents[1]
NEVER = ("pydantic", "pandas", "matplotlib", "torchvision", "tensorboard", "webdataset", "diffusion.trainer")


def modules_after(code, *words):
    """Names of the modules that a fresh interpreter has loaded at the end."""
    ending = "; import sys, json; print(json.dumps(sorted(sys.modules)), file=sys.stderr)"
    command = [sys.executable, "-W", "ignore", "-c", code + ending, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 0, done.stderr[-2000:]
    return set(json.loads(done.stderr.splitlines()[-1]))


@pytest.mark.parametrize(
    ("code", "unwanted"),
    [
        ("import diffusion", ("torch", "numpy", "PIL", "transformers", "diffusers", *NEVER)),
        ("from diffusion import TextToImage", ("transformers", "diffusers", "peft", "accelerate", "scipy", *NEVER)),
        (
            "from diffusion import TextToImage as T; import sys; T.load(sys.argv[1])('red apple', seed=1, steps=1)",
            (*NEVER, "diffusers.pipelines", "diffusers.models.transformers.transformer_flux", "diffusion.config"),
        ),
    ],
    ids=["import", "ready to load", "a picture"],
)
def test_nothing_is_imported_that_is_not_needed(tiny_model, code, unwanted):
    loaded = modules_after(code, str(tiny_model))
    assert not loaded & set(unwanted)
    assert "diffusion" in loaded


def test_the_stock_library_is_whole_afterwards():
    """Its crowded packages were bare folders while our classes were imported."""
    code = (
        "from diffusion.models import stock; import diffusers; import diffusers.models.autoencoders; "
        "import diffusers.models.transformers, diffusers.hooks; from diffusers import FluxTransformer2DModel; "
        "assert diffusers.AutoencoderKL is stock.AutoencoderKL; "
        "assert diffusers.models.autoencoders.AutoencoderKL is stock.AutoencoderKL; "
        "assert diffusers.UNet2DConditionModel is stock.UNet2DConditionModel; "
        "assert diffusers.models.transformers.FluxTransformer2DModel is FluxTransformer2DModel"
    )
    assert "diffusers.models.transformers.transformer_flux" in modules_after(code)


def trial(steps, error, hits=1.0, sampler="ddim"):
    settings = {"sampler": sampler, "schedule": "trailing", "steps": steps}
    return Trial(settings | {"guidance_scale": 2.0, "guidance_interval": None}, error, hits, 2 * steps)


def test_the_cheapest_settings_that_are_as_good_are_chosen():
    reference = trial(50, 100)
    asked = []

    def trials(*some):
        for one in some:
            asked.append(one)
            yield one

    some = (trial(3, 120), trial(4, 101, 0.9), trial(5, 101.5), trial(5, 100.5, sampler="unipc"), trial(6, 99))
    assert first_as_good(reference, trials(*some, trial(8, 90))).settings["sampler"] == "unipc"
    assert len(asked) == 5, "what is dearer is not even tried"
    assert first_as_good(reference, trials(trial(3, 120))) is reference


def test_tune_writes_what_it_found_into_the_recipe(tiny_model, labelled, tmp_path, capsys):  # noqa: F811
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    before = json.loads((model / "recipe.json").read_text())
    words = ["tune", str(model), "--data", str(labelled), "--count", "2"]
    assert main([*words, "--dry-run"]) == 0
    assert json.loads((model / "recipe.json").read_text()) == before
    assert "evaluations" in capsys.readouterr().out
    assert main(words) == 0
    after = json.loads((model / "recipe.json").read_text())
    assert after["steps"] != before["steps"] or after["sampler"] != before["sampler"]
    assert {"width", "prompts", "guidance_scale"} <= after.keys()
    assert main(["tune", "nowhere"]) == 2
    assert main(["tune", str(model), "--data", str(tmp_path / "nowhere")]) == 2


def test_candidates_take_turns_and_the_first_one_shows_the_noise():
    order = []

    def candidate(name, seconds):
        def run():
            order.append(name)
            return seconds

        return run

    found = contest({"peer": candidate("peer", 3.0), "ours": candidate("ours", 1.0)}, rounds=2)
    assert order == ["peer", "ours", "peer"] * 3, "one round warms up"
    assert found.ratio("peer", "ours") == 3
    assert found.drift == 0
    row = Row.of("P0", "a figure", found, "peer", "ours", 2.5)
    assert row.met
    assert "| P0 | a figure | 3 s | 1 s | 3 | 2.5 | yes |" in render([row])
    noisy = Contest({"peer": Timing([1.0, 1.0]), "ours": Timing([0.1, 0.1])}, Timing([1.1, 1.1]))
    assert not noisy.counts
    assert not Row.of("P0", "a figure", noisy, "peer", "ours", 2.5).met
    assert "too noisy" in render([Row.of("P0", "a figure", noisy, "peer", "ours", 2.5)])


def test_a_set_of_many_pictures_costs_no_more_a_picture():
    few, many = feed(1_000), feed(20_000)
    assert all(many[name] < 1.5 * few[name] for name in few if name.startswith("bytes"))
    assert many["bytes a picture of the order"] < 40


def test_calls_of_a_method_are_timed_within_the_block_and_not_after_it():
    class Thing:
        def double(self, number):
            return 2 * number

    with clocked(Thing, "double") as spent:
        assert Thing().double(4) == 8
    Thing().double(4)
    assert len(spent) == 1
    assert spent[0] >= 0


def test_a_command_is_not_held_up_by_looking_for_garbage():
    """What imports leave behind is looked through neither at every thousandth object nor once more at the exit."""
    code = (
        "import atexit, gc; from diffusion.cli import enter; "
        "atexit.register(lambda: print(gc.get_freeze_count() > 0, gc.get_threshold()[0] > 10_000)); enter(lambda: 3)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stdout.split()) == (3, ["True", "True"])
