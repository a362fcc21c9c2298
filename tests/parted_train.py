"""``train.py`` on processes that disagree about which precision is fast here."""

import os
import sys

import torch

from diffusion import config, trainer

if __name__ == "__main__":
    trainer.fast_dtype = lambda device: torch.bfloat16 if os.environ["RANK"] == "1" else torch.float32
    trainer.train(config.load(sys.argv[1]))
