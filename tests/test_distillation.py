"""The few-step student: what it is told to learn, against the samplers; and that it learns it through the loop."""

import pytest
import torch

from diffusion import TextToImage, config, trainer
from diffusion.guidance import classifier_free_guidance
from diffusion.models import text
from diffusion.models.denoiser import network_denoiser
from diffusion.models.folder import load_model
from diffusion.samplers import euler, transfer
from diffusion.schedules import levels
from diffusion.schema import Distill
from diffusion.tasks.distillation import DistillationLoss, frozen_copy
from runs import metrics


def batch_of(model, count, step, steps):
    generator = torch.Generator().manual_seed(step)
    shape = (count, model.unet.config.in_channels, 8, 8)
    latents, noise = (torch.randn(shape, generator=generator) for _ in range(2))
    tokens = text.tokenize(model, ["red apple", "blue boat"][:count])
    return {"latents": latents, "noise": noise, "u": torch.full((count,), (step + 0.5) / steps), **tokens}


@pytest.mark.parametrize("step", range(4))
def test_the_target_is_where_the_teachers_guided_steps_lead(tiny_model, step):
    """Against the samplers: guided Euler on the fine grid, and one step on the coarse one."""
    model = load_model(tiny_model)
    settings = Distill(steps=4, teacher_steps=5, guidance=3.0)
    loss = DistillationLoss(model, frozen_copy(model.unet), settings)
    batch = batch_of(model, 2, step, 4)
    fine, coarse = levels(model.schedule, 20), levels(model.schedule, 4)
    assert fine[::5] == coarse, "the student's levels are among the teacher's"
    path = fine[5 * step : 5 * step + 6]
    start, end = path[0], path[-1]
    x = start.alpha * batch["latents"] + start.sigma * batch["noise"]
    with torch.no_grad():
        wanted, unwanted = text.encode(model, batch), text.encode(model, text.tokenize(model, ["", ""]))
        both = {name: torch.cat([unwanted[name], wanted[name]]) for name in wanted}
        make = lambda condition: network_denoiser(model.unet, model.schedule, model.prediction, condition)  # noqa: E731
        guided = classifier_free_guidance(make(both), make(wanted), 3.0)
        *_, last = euler(guided, x, path, lambda *_: torch.zeros(()))
        a, b, _ = transfer(start, end)
        target = (last.x - a * x) / b
        expected = (make(wanted)(x, start) - target).square().mean(dim=(1, 2, 3))
        found = loss(batch)
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-5)
    assert found.min() > 0


def test_a_student_that_is_its_teacher_has_nothing_to_learn(tiny_model):
    model = load_model(tiny_model)
    loss = DistillationLoss(model, frozen_copy(model.unet), Distill(steps=4, teacher_steps=1, guidance=1.0))
    for step in range(4):
        assert loss(batch_of(model, 2, step, 4)).max() < 1e-8


def test_steps_that_do_not_nest_are_refused(tiny_model):
    model = load_model(tiny_model)
    with pytest.raises(ValueError, match="do not divide the model's 1000 noise levels"):
        DistillationLoss(model, model.unet, Distill(steps=3, teacher_steps=5))


@pytest.mark.parametrize("lora", [None, {"rank": 4, "targets": "all"}])
def test_a_student_learns_through_the_one_loop(home, straight, lora):
    run = config.validate(
        {
            "task": "text_to_image",
            "name": f"student-{lora is not None}",
            "output": str(home / "runs"),
            "data": {"path": str(home), "size": 16, "captions": {"dropout": 0}},
            "model": {"base": str(straight / "model"), "lora": lora},
            "loss": {"distill": {"steps": 2, "teacher_steps": 2, "guidance": 2.0}},
            "train": {"steps": 40, "batch_size": 8, "lr": 1e-2, "precision": "fp32", "log_every": 10, "ema": 0},
            "recipe": {"steps": 2, "guidance_scale": 1.0, "prompts": ["red square"]},
        }
    )
    folder = trainer.train(run, quiet=True)
    losses = metrics(run.folder)
    assert losses[-1] < 0.7 * losses[0]
    student = TextToImage.load(folder)
    assert (student.model.recipe.steps, student.model.recipe.guidance_scale) == (2, 1.0)
    assert student("red square", seed=1)[0].size == (16, 16)
    assert (folder / "unet").is_dir() == (lora is None)


def test_what_distillation_ignores_is_refused(home, straight):
    tree = {
        "task": "text_to_image",
        "name": "x",
        "data": {"path": str(home), "size": 16},
        "model": {"base": str(straight / "model")},
        "loss": {"distill": {}, "weighting": "min_snr"},
    }
    with pytest.raises(ValueError, match=r"loss\.weighting: has no effect with loss\.distill"):
        config.validate(tree)
