"""``diffusion ui`` as its own process, and a real browser that looks at it.

``python tests/browsing.py`` draws a few pictures on the page and photographs it: docs/ui.png.
"""

import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]
DESK = {"width": 1280, "height": 800}  # pixels
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or "/usr/bin/chromium"
# In the server: whatever it asks the network for is written down, but for what stays on this machine.
WATCH = """
import os, sys
def watch(event, values):
    if event == "socket.connect" and isinstance(values[1], tuple):
        host = values[1][0]
    elif event == "socket.getaddrinfo":
        host = values[0]
    else:
        return
    if host not in (None, "127.0.0.1", "localhost", "::1", "0.0.0.0"):
        with open(os.environ["WATCHED"], "a") as file:
            print(event, host, file=file)
sys.addaudithook(watch)
"""


@contextmanager
def served(
    model: Path | str, output: Path, *flags: str, program: Sequence[str] = ("-m", "diffusion")
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The address of a page and its process, which Ctrl-C ends. Its folder for what is temporary is its own.

    What it says on stderr is in a file beside ``output``, and told at the end.
    """
    told = Path(f"{output}.stderr")
    with tempfile.TemporaryDirectory() as folder, told.open("w") as errors:
        (Path(folder) / "sitecustomize.py").write_text(WATCH)
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([folder, str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "TMPDIR": folder,  # what gradio shows of itself lies there and in the current folder: ``output`` in neither
            "WATCHED": f"{output}.network",
        }
        command = [sys.executable, *program, "ui", "--port", "0", "--model", str(model), "-o", str(output), *flags]
        heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # which who runs us behind a shell may not have
        how: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": errors, "text": True, "env": environment}
        process = subprocess.Popen(command, preexec_fn=heard, **how)
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip(), process
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(30)
            sys.stderr.write(told.read_text())


@contextmanager
def browsed() -> Iterator[Any]:
    """A window of a browser that nobody sees."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser.new_context(viewport=DESK)
        browser.close()


def opened(window: Any, url: str) -> Any:
    """The page in a window, once it can be typed into; ``requests`` of it are kept."""
    page = window.new_page()
    page.set_default_timeout(60_000)  # a machine that is busy otherwise
    page.requests = []
    page.on("request", lambda request: page.requests.append(request.url))
    page.goto(url)
    page.get_by_label("Prompt", exact=True).wait_for()
    return page


def filled(page: Any, **given: Any) -> None:
    """Fields by their label; ``Negative_prompt`` is the negative prompt."""
    for label, value in given.items():
        page.get_by_label(label.replace("_", " "), exact=True).fill(str(value))


def drawn(page: Any, **given: Any) -> str:
    """Fill fields in and draw; what the page says at the end."""
    filled(page, **given)
    before = page.locator("#status .prose").inner_text()
    page.get_by_role("button", name="Draw", exact=True).click()
    page.wait_for_function(
        """before => { const said = document.querySelector("#status .prose"), text = said.innerText.trim();
        return text != before.trim() && (/^(Done|Stopped):/.test(text) || said.querySelector("[role=alert]")) }""",
        arg=before,
    )
    return str(page.locator("#status .prose").inner_text()).strip()


def begun(page: Any, picture: Path) -> None:
    """Give the page a picture to begin from."""
    page.get_by_role("tab", name="Begin from a picture").click()
    page.locator("#editor canvas").first.wait_for()
    page.wait_for_timeout(300)  # the editor says nothing of when it can take it
    page.locator("#editor input[type=file]").first.set_input_files(picture)
    page.locator("#editor button[aria-label=Undo]:not([disabled])").wait_for()  # it is there


def painted(page: Any) -> None:
    """A stroke across the upper half of the editor, once that has come to rest: what is painted before is lost."""
    page.get_by_role("tab", name="Begin from a picture").click()
    page.wait_for_timeout(700)
    box = page.locator("#editor canvas").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2 - 60
    page.mouse.move(x - 80, y)
    page.mouse.down()
    page.mouse.move(x + 80, y, steps=12)
    page.mouse.up()


def decibels(one: Path | str, other: Path | str) -> float:
    """PSNR of two files; two copies of the same weights may round otherwise, which 60 dB allow for."""
    first, second = (np.asarray(Image.open(path).convert("RGB"), float) for path in (one, other))
    error = float(np.square(first - second).mean())
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def photograph() -> None:
    """Draw a few pictures, and take docs/ui.png of them."""
    with tempfile.TemporaryDirectory() as folder, browsed() as window:
        os.chdir(folder)
        with served("emoji", Path("outputs")) as (url, _):
            page = opened(window, url)
            for prompt in ("red apple", "rocket", "Christmas tree", "crying face", "pizza", "rainbow", "unicorn"):
                drawn(page, Prompt=prompt, Seed=1)
            page.get_by_label("Pictures", exact=True).fill("4")
            drawn(page, Prompt="panda", Seed=3)
            page.wait_for_timeout(500)
            page.screenshot(path="page.png")
        Image.open("page.png").convert("RGB").quantize(256, dither=Image.Dither.NONE).save(
            ROOT / "docs/ui.png", optimize=True
        )


if __name__ == "__main__":
    photograph()
