"""Optimizers by name, and their state under names that do not depend on the order of parameters."""

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffusion.schema import Train

NUMBERS = {  # kept for each trained weight, to tell memory beforehand
    "adamw": 2.0,
    "adamw8bit": 0.5,
    "adafactor": 0.02,
    "muon": 1.0,
    "prodigy": 4.0,
    "schedule_free": 2.0,
}


PACKAGES = {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt", "schedule_free": "schedulefree"}


def check(train: Train) -> None:
    """ValueError if the optimizer that the config names lives in a package that is not installed."""
    if train.optimizer in PACKAGES:
        _installed(PACKAGES[train.optimizer])


def build(module: nn.Module, train: Train) -> torch.optim.Optimizer:
    """The optimizer that the config names, over what is trainable; weight decay on matrices and kernels only.

    ValueError if it lives in a package that is not installed.
    """
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    hidden = {id(parameter) for parameter in _hidden_weights(module)} if train.optimizer == "muon" else set()
    decay, plain = {"weight_decay": train.weight_decay}, {"weight_decay": 0.0}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trainable if p.ndim > 1 and id(p) not in hidden], **decay},
        {"params": [p for p in trainable if p.ndim <= 1], **plain},
        {"params": [p for p in trainable if id(p) in hidden], "orthogonal": True, **decay},
    ]
    groups = [group for group in groups if group["params"]]
    betas = (train.betas[0], train.betas[1])
    match train.optimizer:
        case "adamw":  # Loshchilov & Hutter 1711.05101
            return torch.optim.AdamW(groups, lr=train.lr, betas=betas, fused=True)
        case "muon":
            return Muon(groups, lr=train.lr, betas=betas, fused=True)
        case "adafactor":  # Shazeer & Stern 1804.04235: the second moments of a matrix in its rows and columns
            return torch.optim.Adafactor(groups, lr=train.lr)
        case "adamw8bit":  # Dettmers et al. 2110.02861
            return _installed(PACKAGES["adamw8bit"]).optim.AdamW8bit(groups, lr=train.lr, betas=betas)
        case "prodigy":  # Mishchenko & Defazio 2306.06101: train.lr multiplies the size it finds, so it is 1
            return _installed(PACKAGES["prodigy"]).Prodigy(groups, lr=train.lr, betas=betas)
        case _:  # "schedule_free": Defazio et al. 2405.15682; wants a constant train.lr_schedule and no EMA
            return _installed(PACKAGES["schedule_free"]).AdamWScheduleFree(groups, lr=train.lr, betas=betas)


def _installed(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        raise ValueError(f"this optimizer needs {package}: pip install {package}") from None


class Muon(torch.optim.AdamW):
    """Muon (Jordan et al. 2024) for the groups marked ``orthogonal``, AdamW (1711.05101) for the others.

    The momentum of a weight, as a matrix of outputs by inputs, is replaced by the nearest orthogonal matrix, so that
    every direction of it moves equally far: what is seen rarely is learnt as fast as what is seen often. Scaled as in
    2502.16982, eq. 4, the update has the size of AdamW's, and one learning rate serves both. A kernel of a convolution
    counts as a matrix of outputs by (height x width x inputs).
    """

    momentum = 0.95

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"] if group.get("orthogonal") else ():
                if parameter.grad is not None:
                    self._move(parameter, group["lr"], group["weight_decay"])
                    parameter.grad = None  # so that AdamW passes over it
        return super().step(closure)

    def _move(self, parameter: Tensor, lr: float, weight_decay: float) -> None:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(gradient, 1 - self.momentum)
        ahead = torch.lerp(gradient, state["momentum"], self.momentum)  # Nesterov
        update = orthogonalize(_matrix(ahead))
        parameter.mul_(1 - lr * weight_decay)
        _matrix(parameter).add_(update, alpha=-0.2 * lr * max(update.shape) ** 0.5)


def orthogonalize(matrix: Tensor) -> Tensor:
    """About the nearest matrix with orthonormal rows or columns, whichever are fewer: all singular values near 1.

    Five steps of a quintic Newton-Schulz iteration in bfloat16; its coefficients (Jordan et al. 2024) trade exactness
    for speed, so singular values end between about 0.7 and 1.2.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalize(matrix.T).T
    x = (matrix / matrix.norm().clamp(min=1e-12)).bfloat16()
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.to(matrix.dtype)


def state_tensors(optimizer: Any, module: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state of each parameter under ``<parameter>.<name>``."""
    state = optimizer.state
    return {
        f"{n}.{key}": torch.as_tensor(value)
        for n, p in module.named_parameters()
        if p in state
        for key, value in state[p].items()
    }


def state_numbers(optimizer: Any) -> list[dict[str, float]]:
    """What an optimizer has found for each group of parameters: Prodigy's step size, schedule-free's weights."""
    return [{key: value for key, value in g.items() if isinstance(value, int | float)} for g in optimizer.param_groups]


def load_state(
    optimizer: Any, module: nn.Module, tensors: Mapping[str, Tensor], numbers: Sequence[Mapping[str, float]]
) -> None:
    """What the two above gave; moments take the memory layout of their parameter, as fused kernels expect."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        owner, key = name.rsplit(".", 1)
        found.setdefault(owner, {})[key] = value
    for name, parameter in module.named_parameters():
        for key, value in found.get(name, {}).items():
            like = torch.empty_like(parameter if value.shape == parameter.shape else value, dtype=value.dtype)
            optimizer.state[parameter][key] = like.to(parameter.device).copy_(value)
    for group, values in zip(optimizer.param_groups, numbers, strict=False):
        group.update({key: values[key] for key in group.keys() & values.keys() - {"lr", "weight_decay"}})


def _hidden_weights(module: nn.Module) -> list[Tensor]:
    """Weights of linear layers and convolutions that are matrices worth the name; embeddings are not."""
    layers = (layer for layer in module.modules() if isinstance(layer, nn.Linear | nn.Conv2d))
    return [layer.weight for layer in layers if layer.weight.requires_grad and min(_matrix(layer.weight).shape) >= 32]


def _matrix(weight: Tensor) -> Tensor:
    """A weight as outputs by inputs; a view, for kernels in either memory layout."""
    if weight.ndim == 2:
        return weight
    inner = weight.permute(0, 2, 3, 1)
    return inner.flatten(1) if inner.is_contiguous() else weight.flatten(1)
