"""Every YAML that is shipped can be used as it is."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from diffusion import config

CONFIGS = Path(__file__).parents[1] / "configs"
NAMES = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.y*ml"))
LAUNCHES = [name for name in NAMES if name.startswith("accelerate/")]
RUNS = [name for name in NAMES if name not in LAUNCHES]


def test_some_are_shipped() -> None:
    assert RUNS


@pytest.mark.parametrize("name", RUNS)
def test_run_config_loads(name: str) -> None:
    assert config.load(CONFIGS / name).train.steps >= 1


@pytest.mark.parametrize("name", LAUNCHES)
def test_accelerate_config_loads(name: str) -> None:
    """Accelerate itself reads the file, and refuses a key that it does not know."""
    launch = load_config_from_file(str(CONFIGS / name))
    assert launch.compute_environment == "LOCAL_MACHINE"
    assert launch.num_processes >= 1
