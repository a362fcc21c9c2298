"""Every YAML that is shipped can be used as it is."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from diffusion import config

CONFIGS = Path(__file__).parents[1] / "configs"
RUNS = sorted(path for path in CONFIGS.rglob("*.y*ml") if path.parent.name != "accelerate")
LAUNCHES = sorted((CONFIGS / "accelerate").rglob("*.y*ml"))


def relative(path: Path) -> str:
    return str(path.relative_to(CONFIGS))


def test_some_are_shipped() -> None:
    assert RUNS


@pytest.mark.parametrize("path", RUNS, ids=relative)
def test_run_config_loads(path: Path) -> None:
    loaded = config.load(path)
    assert loaded == config.load(path, []), "a run's config is the same each time it is read"


@pytest.mark.parametrize("path", LAUNCHES, ids=relative)
def test_accelerate_config_loads(path: Path) -> None:
    """Accelerate itself reads the file and refuses a key that it does not know."""
    loaded = load_config_from_file(str(path))
    assert loaded.compute_environment == "LOCAL_MACHINE"
    assert loaded.num_processes >= 1
