"""What a machine is fast at, and whether that is right: measured, not guessed from its name."""

import json
import os
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn


def fast_dtype(device: torch.device | str) -> torch.dtype:
    """bfloat16 where it is at least a quarter faster than float32 and right, else float32.

    fp16 is never chosen: it overflows in common autoencoders, and on a CPU it is slow.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if device.type == "cpu" and _remembered(_cpu_prefers_bf16) else torch.float32


def _remembered(probe: Callable[[], bool]) -> bool:
    """What a probe found on this machine with this PyTorch, measured once and kept in the user's cache."""
    name = f"{processor()} {torch.get_num_threads()} {torch.__version__} {probe.__name__}"
    file = Path.home() / ".cache" / "diffusion" / "machine.json"
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    if name not in known:
        known[name] = probe()
        with suppress(OSError):  # a home that cannot be written to costs a second at every start
            file.parent.mkdir(parents=True, exist_ok=True)
            part = file.with_suffix(f".{os.getpid()}.part")
            part.write_text(json.dumps(known, indent=2), encoding="utf-8")
            os.replace(part, file)
    return bool(known[name])


def processor() -> str:
    """Its name, as far as the system tells it."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return platform.processor()


def compile_if_equal(network: nn.Module, loss: Callable[[], Tensor], tolerance: float = 0.1) -> str | None:
    """Compile a network in place, and keep that only if ``loss`` has the gradient that it has without.

    A compiled autoencoder has been seen not to learn while the same one did without, so it is not believed untried.
    ``loss`` runs the network on a batch of the size it will meet. Returns None, or why the network was left as it was.
    """
    eager = _gradient(network, loss)
    network.compile()
    try:
        error = (_gradient(network, loss) - eager).norm() / eager.norm()
        if error <= tolerance:
            return None
        why = f"compiled gradients are off by {error:.2f} of their norm, more than {tolerance}"
    except Exception as failure:  # no C++ compiler, an operator that it does not know: the run can do without
        why = f"torch.compile failed ({str(failure).strip().splitlines()[0]})"
    network._compiled_call_impl = None
    return f"{why}: training goes on uncompiled"


def _gradient(network: nn.Module, loss: Callable[[], Tensor]) -> Tensor:
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(loss(), parameters, allow_unused=True)
    return torch.cat([gradient.float().flatten() for gradient in found if gradient is not None])


def _cpu_prefers_bf16() -> bool:
    """Both a 3x3 convolution and a matrix product must gain: some processors have fast paths for only one."""
    torch_conv = torch.nn.functional.conv2d
    generator = torch.Generator().manual_seed(0)
    picture = torch.randn(2, 128, 32, 32, generator=generator).to(memory_format=torch.channels_last)
    kernel = torch.randn(128, 128, 3, 3, generator=generator).to(memory_format=torch.channels_last)
    matrix = torch.randn(768, 768, generator=generator)
    probes: list[tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = [
        (lambda x, w: torch_conv(x, w, padding=1), (picture, kernel)),
        (torch.matmul, (matrix, matrix)),
    ]
    return all(_gains(function, arguments) for function, arguments in probes)


@torch.inference_mode()
def _gains(function: Callable[..., Tensor], arguments: tuple[Tensor, ...]) -> bool:
    halves = tuple(argument.bfloat16() for argument in arguments)
    exact, rough = function(*arguments), function(*halves)  # also the warm-up
    error = (rough.float() - exact).norm() / exact.norm()
    return bool(error < 0.02) and _seconds(function, halves) * 1.25 < _seconds(function, arguments)


def _seconds(function: Callable[..., Tensor], arguments: tuple[Tensor, ...]) -> float:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        function(*arguments)
        times.append(time.perf_counter() - start)
    return min(times)
