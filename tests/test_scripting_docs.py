"""docs/scripting.md from top to bottom, in one folder: what stands below a command is what it prints.

A line that begins with ``$`` is typed, and what follows it is printed, on stdout or stderr. What ``cat`` shows before
anything has written it becomes a file. ``...`` stands for what is left out of a line; alone on a line, for some lines.
"""

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from commands import ROOT
from diffusion.cli.generate import run
from test_foreign import png
from test_python_docs import Program, agrees, programs

PAGE = (ROOT / "docs/scripting.md").read_text(encoding="utf-8")
PYTHON = "python -"  # what is typed for a program of the page
NOT_RUN = {
    "accelerate launch": "what two processes print comes in any order: they are run one after the other instead",
    "(ulimit": "how much memory libraries take is another on every machine: tests/test_out_of_memory.py takes it away",
}
VARIES = (  # all that may be otherwise on another machine, or where its processor rounds otherwise
    r'(?<="sha256":\s")[\w.]+',
    r"up to \d+ of 255, \d+\.\d dB",
    r"red \d+ over green \d+",
    r"batches of \d+",  # with --batch-size auto
    r"about \d+\.\d\d GiB beside the libraries, \d+\.\d\d GiB of it weights, and most in [\w -]+",
)
THEIRS = (
    "red apple\nSteps: 6, Sampler: DDIM, CFG scale: 2, Seed: 1, Size: 128x128, Model hash: 6ce0161689, "
    "Model: v1-5-pruned-emaonly, ENSD: 31337"
)


class Step(NamedTuple):
    typed: str
    shown: str

    @property
    def not_run(self) -> str | None:
        return next((why for start, why in NOT_RUN.items() if self.typed.startswith(start)), None)


def steps() -> Iterator[Step]:
    for language, block in re.findall(r"^```(.*)\n((?:.*\n)*?)```$", PAGE, re.MULTILINE):
        if language == "python":
            yield Step(PYTHON, block)
            continue
        assert block.startswith("$ "), f"nobody types this: {block}"
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            typed, _, shown = part.partition("\n")
            yield Step(typed, shown)


STEPS = list(steps())


def take(step: Step, before: int) -> tuple[str, int]:
    """What one step prints, and its exit code, after one that has left with ``before``."""
    said = io.StringIO()
    words = shlex.split(step.typed, comments=True)
    variables = dict(word.split("=") for word in words if re.match("[A-Z_]+=", word))
    if step.typed == "echo $?":
        return f"{before}\n", 0
    if words[0] == "cat" and not Path(words[1]).exists():
        Path(words[1]).write_text(step.shown)
    if words[len(variables) :][:2] == ["python", "generate.py"]:
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            for name, value in variables.items():
                patch.setenv(name, value)
            code = run(words[len(variables) + 2 :], prog="generate.py")
        return said.getvalue(), code
    if step.typed == PYTHON:
        with contextlib.redirect_stdout(said):
            exec(compile(step.shown, "docs/scripting.md", "exec"), {})
        return said.getvalue(), 0
    done = subprocess.run(["bash", "-c", step.typed], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr, done.returncode


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What every step of the page prints, on a machine without a GPU."""
    found, code, threads = list[str](), 0, torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("page"))
        patch.setattr("torch.cuda.is_available", lambda: False)
        patch.setattr(sys, "path", [*sys.path])  # a checker's folder is put there
        png("theirs.png", (128, 128), parameters=THEIRS)
        (checks,) = (one.code for one in programs("docs/generating.md") if "def reddish" in one.code)
        Path("checks.py").write_text(checks)
        patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        patch.setenv("PYTHONPATH", str(ROOT))
        torch.set_num_threads(1)  # two copies of a model round alike
        try:
            for step in STEPS:
                said, code = ("", 0) if step.not_run else take(step, code)
                found.append(said)
        finally:
            torch.set_num_threads(threads)
    return found


def usual(text: str) -> str:
    """The same lines without what varies, as if they were printed in the root of the project."""
    text = "".join(f"{line.rstrip()}\n" for line in text.replace(f"{ROOT}/", "").splitlines())
    for pattern in VARIES:
        text = re.sub(pattern, "(varies)", text)
    return text


def pattern_of(shown: str) -> str:
    """What is printed where this is shown: ``...`` is anything."""
    whole = re.escape(usual(shown)).replace(re.escape("..."), ".*")
    return re.sub(r"^\.\*\\\n", r"(?:.*\\n)+", whole, flags=re.MULTILINE)


@pytest.mark.parametrize("number", range(len(STEPS)), ids=[step.typed for step in STEPS])
def test_a_command_prints_what_its_page_shows(number: int, printed: list[str]) -> None:
    step, said = STEPS[number], printed[number]
    if step.not_run:
        pytest.skip(step.not_run)
    if step.typed == PYTHON:
        says = Program("docs/scripting.md", number, step.shown, []).says
        assert len(says) == len(said.splitlines()) > 0
        assert all(map(agrees, said.splitlines(), says)), said
    else:
        assert re.fullmatch(pattern_of(step.shown), usual(said)), f"{step.typed} prints\n{said}"


def test_what_is_not_run_is_on_the_page():
    assert {step.not_run for step in STEPS} == {None, *NOT_RUN.values()}
