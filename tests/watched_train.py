"""``train.py`` of several runs, noting in their folders what each optimizer step uses: learning rate and gradients."""

import os
import sys
from contextlib import contextmanager

import torch

from diffusion import config, optimizers, trainer
from diffusion.tasks.text_to_image import DenoisingLoss


@contextmanager
def watched(double=False):
    """Within the block each step is noted; ``double``: networks and batches are in float64."""
    notes, build, task_of, forward = [], optimizers.build, trainer.tasks.build, DenoisingLoss.forward

    def build_watched(module, train):
        optimizer = build(module, train)

        def note(optimizer, *_):
            trained = [p for p in module.parameters() if p.requires_grad]
            gradient = torch.cat([p.grad.flatten() for p in trained])
            notes.append({"lr": [group["lr"] for group in optimizer.param_groups], "gradient": gradient.clone()})

        optimizer.register_step_pre_hook(note)
        return optimizer

    def task_in_double(*given):
        task = task_of(*given)
        task.module.double()
        return task

    def forward_in_double(self, batch):
        return forward(self, {name: x.double() if x.is_floating_point() else x for name, x in batch.items()})

    optimizers.build = build_watched
    if double:
        trainer.tasks.build, DenoisingLoss.forward = task_in_double, forward_in_double
    try:
        yield notes
    finally:
        optimizers.build, trainer.tasks.build, DenoisingLoss.forward = build, task_of, forward


if __name__ == "__main__":
    for file in sys.argv[1:]:
        run = config.load(file)
        with watched(double="double" in run.name) as notes:
            trainer.train(run)
        torch.save(notes, run.folder / f"notes-{os.environ['RANK']}.pt")
