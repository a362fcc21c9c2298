"""The house rules of the package, read from its imports: they point down only, and each library has one home."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "diffusion"
LAYERS = (  # top to bottom; __init__ is the front door: it may open every room, and no room may open it
    {"__init__"},
    {"cli", "page", "style", "__main__"},
    {"pipeline", "trainer", "run", "plan", "optimizers", "tasks", "evaluation", "validation", "report"}
    | {"drawing", "repair", "loading", "tuning", "studio"},
    {"checkpoint", "interop", "foreign", "images", "safety", "records", "canvas", "sheets", "memory"},
    {"models", "data"},
    {"schedules", "objectives", "samplers", "guidance", "ema", "precision"},
    {"config", "schema", "settings", "names", "places", "prompts", "pixels", "rng", "values"}
    | {"options", "jobs", "manifest", "notices", "parameters", "comparison"},
)
HEIGHT = {room: -depth for depth, rooms in enumerate(LAYERS) for room in rooms}
WALLS = {
    ("models", "data"),
    ("data", "models"),
    *((a, b) for a in ("pipeline", "drawing", "loading") for b in ("trainer", "data")),
}
FORMULAS = LAYERS[5]
HOMES = {  # library -> the only rooms that may import it
    "accelerate": {"trainer"},
    "diffusers": {"models", "interop"},
    "transformers": {"models", "interop"},
    "peft": {"models", "interop"},
    "gradio": {"page"},
}


def room_of(path: Path) -> str:
    """``diffusion/models/text.py`` -> ``models``; ``diffusion/rng.py`` -> ``rng``."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """Absolute dotted names that a file imports at any depth: ``from ..rng import bits`` -> ``diffusion.rng.bits``."""
    package = ("diffusion", *path.relative_to(ROOT).parts[:-1])
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            names |= {".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names}
    return names


def targets_of(path: Path) -> set[str]:
    """The rooms that a file opens: ``diffusion.rng.bits`` -> ``rng``; the package itself is ``__init__``."""
    inside = [name.split(".") for name in imports_of(path) if name.split(".")[0] == "diffusion"]
    return {parts[1] if len(parts) > 1 else "__init__" for parts in inside} - {"__version__"}


FILES = sorted(ROOT.rglob("*.py"))
TRAPS = range(1, 25)  # the mistakes of other trainers that this one is tested for, by number
COMMANDS = sorted(path for path in FILES if room_of(path) == "cli")


def test_every_known_trap_has_a_test() -> None:
    tests = "\n".join(file.read_text(encoding="utf-8") for file in Path(__file__).parent.glob("test_*.py"))
    assert {int(number) for number in re.findall(r"^def test_trap_(\d+)_", tests, re.MULTILINE)} == set(TRAPS)


def test_the_package_is_found() -> None:
    assert len(FILES) >= 10
    assert COMMANDS


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    room, targets = room_of(path), targets_of(path)
    assert {room} | targets <= HEIGHT.keys(), f"rooms without a layer: {({room} | targets) - HEIGHT.keys()}"
    for target in targets - {room}:
        assert HEIGHT[target] <= HEIGHT[room], f"{path.name} imports {target}, which lies above it"
        assert (room, target) not in WALLS, f"{path.name} imports {target}: {room} and {target} do not know each other"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_libraries_stay_in_their_homes(path: Path) -> None:
    room = room_of(path)
    libraries = {name.split(".")[0] for name in imports_of(path)} - sys.stdlib_module_names - {"diffusion"}
    for library in libraries & HOMES.keys():
        assert room in HOMES[library], f"{path.name} imports {library}, whose home is {sorted(HOMES[library])}"
    if room in FORMULAS:
        assert libraries <= {"torch", "numpy"}, f"{path.name} holds formulas: torch only, got {sorted(libraries)}"
    assert room not in LAYERS[-1] or "torch" not in libraries, f"{path.name} must not import torch"


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_do_not_import_torch(path: Path) -> None:
    """``--help`` and a mistyped flag answer in a blink: torch is imported only once the command is understood."""
    module = ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr or f"import {module} imports torch"
