"""``train.py`` with its weights sharded over CPU processes by PyTorch's own FSDP2, which Accelerate keeps for GPUs."""

import sys

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from diffusion import config, trainer


def prepare(accelerator, module, optimizer_of):
    mesh = init_device_mesh("cpu", (accelerator.num_processes,))
    module.to(memory_format=torch.contiguous_format)
    for block in (*module.unet.down_blocks, *module.unet.up_blocks, module):
        fully_shard(block, mesh=mesh)
    return module, accelerator.prepare_optimizer(optimizer_of(module))


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)
    trainer.prepare = prepare
    trainer.train(config.load(sys.argv[1]))
