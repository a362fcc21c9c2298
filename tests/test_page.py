"""The page of ``diffusion ui``: what it answers when it is touched, and itself in a real browser."""

import importlib
import io
import os
import shlex
import signal
import subprocess
import sys
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from browsing import CHROMIUM, DESK, ROOT, begun, browsed, decibels, drawn, filled, opened, painted, served
from commands import made
from diffusion import TextToImage
from diffusion.cli.ui import ASIDE
from diffusion.studio import Form, Studio
from test_studio import crafted


def require(*modules, programs=()):
    """In CI all of it must be there; elsewhere what needs it is skipped where it is not."""
    missing = [name for name in modules if find_spec(name) is None]
    missing += [Path(path).name for path in programs if not Path(path).is_file()]
    if missing:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"{' and '.join(missing)}: not installed")


@pytest.mark.parametrize(("value", "ended"), [("true", pytest.fail.Exception), ("", pytest.skip.Exception)])
def test_what_is_not_installed_is_skipped_but_in_ci(monkeypatch, value, ended):
    monkeypatch.setenv("CI", value)
    require("gradio" if find_spec("gradio") else "json", programs=[sys.executable])
    with pytest.raises((pytest.fail.Exception, pytest.skip.Exception), match="nowhere and nothing: not") as caught:
        require("nowhere", "json", programs=["/nothing"])
    assert caught.type is ended


# --- what it answers


@pytest.fixture
def shown(tiny_model, tmp_path, monkeypatch):
    """The page, and nobody who looks at it."""
    require("gradio")
    monkeypatch.chdir(tmp_path)
    for name, value in ASIDE.items():
        monkeypatch.setenv(name, value)
    studio = Studio(model=TextToImage.load(tiny_model, "cpu"), name=str(tiny_model))
    return importlib.import_module("diffusion.page").Page(studio)


def draw(shown, session, **asked):
    """What a session sees of a drawing, step by step."""
    form = Form(**{"prompt": "red cat", "seed": "1", "sampler": "ddim"} | asked)
    values = (getattr(form, name) for name in importlib.import_module("diffusion.page").FIELDS)
    return shown._draw(Namespace(session_hash=session), *values, None)


def test_what_was_drawn_before_a_failure_is_on_the_shelf(shown, monkeypatch):
    seen = []
    monkeypatch.setattr("diffusion.studio.is_black", lambda image: seen.append(image) or 1 / (2 - len(seen)) < 0)
    *_, last = draw(shown, "x", num_images=2)
    assert "ZeroDivisionError" in last[shown.status]
    assert last[shown.listed] == shown.studio.pictures(9)
    assert [made(path)["seed"] for path in last[shown.listed]] == [1]


def test_stop_ends_what_its_session_draws_then_and_nothing_later(shown):
    before, waiting, other = draw(shown, "x", steps=999), draw(shown, "x"), draw(shown, "y", steps=2)
    assert "step 0 of 999" in [next(before), next(before)][1][shown.status]
    next(waiting)
    next(other)
    shown._stop(Namespace(session_hash="x"))
    after = draw(shown, "x", steps=3)
    next(after)
    said = [list(drawing)[-1][shown.status] for drawing in (before, waiting, other, after)]
    assert [text.partition(":")[0].rpartition(">")[2] for text in said] == ["Stopped", "Stopped", "Done", "Done"]
    assert [made(path)["steps"] for path in shown.studio.pictures(9)] == [3, 2]


def test_what_is_done_or_left_is_not_remembered(shown):
    left = draw(shown, "x", steps=999)
    next(left), next(left)
    assert len(shown.stops) == 1
    left.close()  # nobody looks on any more
    list(draw(shown, "y"))
    shown._stop(Namespace(session_hash="z"))
    assert not shown.stops
    assert [made(path)["steps"] for path in shown.studio.pictures(9)] == [4], "it was ended"


@pytest.mark.parametrize(
    ("wrong", "command", "fact"),
    [
        ({"dtype": "float64"}, "its record says dtype 'float64'", "<dt>Steps</dt>"),
        ({"repairs": 7}, "python generate.py 'red cat' ", "<dt>Repaired</dt><dd>7</dd>"),
        ({"flagged": "a\n<b>"}, "python generate.py 'red cat' ", "<dt>Flagged</dt><dd>a\n&lt;b&gt;</dd>"),
        ({"model_hash": "", "model": "b\nrm c"}, "# drawn by b rm c, and not by tiny as it is here", "<dt>Steps</dt>"),
        ({"init_image": {"name": "n" * 999}}, "] File name too long", "<dt>Steps</dt>"),
    ],
    ids=str,
)
def test_a_damaged_record_leaves_a_picture_to_look_at(shown, wrong, command, fact):
    *_, last = draw(shown, "x")
    seen = shown._look([crafted(last[shown.shown], **wrong)], Namespace(index=0))
    assert seen[shown.picture].value["path"].endswith("crafted.png")
    assert "red cat" in seen[shown.facts]
    assert fact in seen[shown.facts]
    assert command in seen[shown.command]
    assert seen[shown.command].startswith(("# ", "python generate.py "))
    assert "\n" not in seen[shown.command], "what is pasted is one line"


def test_what_cannot_be_filled_in_is_told(shown):
    *_, last = draw(shown, "x")
    for wrong, answer, said in (
        ({"seed": None}, shown._reuse, "crafted.png does not say its seed"),
        ({"prompts": ["a", "b"]}, shown._refill, "no field for several prompts"),
        ({"init_image": {"name": "n" * 999}}, shown._refill, "File name too long"),
    ):
        told = answer(crafted(last[shown.shown], "outputs/crafted.png", **wrong))
        assert list(told) == [shown.status]
        assert said in told[shown.status]


# --- the page in a browser


@pytest.fixture(scope="module")
def window():
    require("gradio", "playwright", programs=[CHROMIUM])
    with browsed() as found:
        yield found


@pytest.fixture(scope="module")
def site(window, tmp_path_factory):
    """Where the shipped model's page is, and the folder that it draws into."""
    output = tmp_path_factory.mktemp("site") / "drawn"
    with served("emoji", output) as (url, process):
        yield url, output, process
    assert process.returncode == 130, "Ctrl-C"
    assert not Path(f"{output}.network").exists(), "the server asked a network for something"


@pytest.fixture
def page(window, site):
    found = opened(window, site[0])
    yield found
    found.close()
    away = [url for url in found.requests if not url.startswith((site[0], "data:", "blob:"))]
    assert found.requests
    assert not away, "the page asked a network for something"


def newest(output):
    return max(output.glob("*.png"), key=lambda path: path.stat().st_mtime_ns)


WATCHED = """
window.seen = { pictures: new Set(), steps: new Set() };
new MutationObserver(() => {
    const picture = document.querySelector("#picture img"), bar = document.querySelector("#status progress");
    if (picture) seen.pictures.add(picture.src);
    if (bar) seen.steps.add(bar.value);
}).observe(document.body, { subtree: true, childList: true, attributes: true });
"""


def test_a_prompt_becomes_a_picture_that_its_line_draws_again(page, site):
    url, output, _ = site
    page.evaluate(WATCHED)
    said = drawn(page, Prompt="red apple", Negative_prompt="it's blue", Seed=11, Steps=30)
    path = newest(output)
    assert said == f"Done: {path}"
    assert (made(path)["seed"], made(path)["steps"], made(path)["negative_prompt"]) == (11, 30, "it's blue")
    shown = page.locator("#picture img")
    assert (
        Image.open(io.BytesIO(page.request.get(shown.get_attribute("src")).body())).tobytes()
        == Image.open(path).tobytes()
    )
    pictures, steps = page.evaluate("[[...seen.pictures], [...seen.steps]]")
    assert len(pictures) >= 2, "a preview came before the picture"
    assert any(0 < step < 30 for step in steps), "and so did the bar"
    page.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=url.rstrip("/"))
    page.get_by_role("button", name="Copy the command line").click()
    line = page.evaluate("navigator.clipboard.readText()")
    assert line == page.locator("#command textarea").input_value()
    python, *rest = shlex.split(line)
    assert (python, rest[0]) == ("python", "generate.py")
    done = subprocess.run([sys.executable, *rest], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert decibels(done.stdout.strip(), path) >= 60


def test_a_picture_of_the_gallery_gives_its_settings_back(page, site):
    assert drawn(page, Prompt="rocket", Seed=12, Steps=3, Pictures=2).startswith("Done: ")
    assert "--num-images 2" in page.locator("#command textarea").input_value(), "all that was drawn"
    path = site[1] / "chosen.png"
    newest(site[1]).rename(path)
    os.utime(path, (2**32, 2**32))  # the newest for ever
    page.reload()
    page.locator("#gallery button").first.click()
    page.locator("#facts").get_by_text("chosen.png").wait_for()
    facts = page.locator("#facts").inner_text()
    assert facts.startswith("rocket")
    assert "Seed\n13" in facts
    assert page.get_by_label("Prompt", exact=True).input_value() == ""
    page.get_by_role("button", name="Reuse last").click()
    page.wait_for_function("[...document.querySelectorAll('input')].some(field => field.value == '13')")
    page.get_by_role("button", name="Random").click()
    page.wait_for_function("![...document.querySelectorAll('input')].some(field => field.value == '13')")
    page.get_by_role("button", name="Put its settings into the fields").click()
    page.get_by_text("The fields are those of this picture.").wait_for()
    values = {
        name: page.get_by_label(name, exact=True).input_value() for name in ("Prompt", "Seed", "Steps", "Pictures")
    }
    assert values == {"Prompt": "rocket", "Seed": "13", "Steps": "3", "Pictures": "1"}
    path.unlink()


def test_a_picture_is_drawn_from_another_and_where_it_is_painted_over(page, site):
    apple = ROOT / "docs/generating/apple.png"
    begun(page, apple)
    assert drawn(page, Prompt="tangerine", Seed=13, Strength="0.4").startswith("Done: ")
    record = made(newest(site[1]))
    assert record["strength"] == 0.4
    assert "mask" not in record
    kept = np.asarray(Image.open(site[1] / "inputs" / record["init_image"]["name"]).convert("RGB"))
    assert np.array_equal(kept, np.asarray(Image.open(apple).convert("RGB"))), "as it was uploaded"
    painted(page)
    assert drawn(page, Prompt="crown", Seed=13, Strength="").startswith("Done: ")
    path = newest(site[1])
    mask = np.asarray(Image.open(site[1] / "inputs" / made(path)["mask"]["name"]).convert("L"))
    assert 0.05 < (mask > 0).mean() < 0.6
    drawing = np.asarray(Image.open(path).convert("RGB"))
    assert np.array_equal(drawing[mask == 0], kept[mask == 0]), "what is not painted over stays to the last bit"
    assert np.abs(drawing[mask == 255].astype(int) - kept[mask == 255]).max() > 50
    studio = Studio(model=TextToImage.load("emoji"), output=site[1])
    assert studio.command(path) == page.locator("#command textarea").input_value()
    page.get_by_role("button", name="Put its settings into the fields").click()
    page.get_by_text("The fields are those of this picture.").wait_for()
    assert drawn(page).startswith("Done: ")
    assert made(newest(site[1])) == made(path), "picture and mask came back as they were"


def test_a_wrong_request_is_told_in_the_page_and_the_next_one_is_drawn(page):
    filled(page, Prompt="red apple", Width=100)
    page.get_by_role("button", name="Draw", exact=True).click()
    page.get_by_role("alert").filter(has_text="width 100 is not a multiple of 8: try 96").wait_for()
    assert (
        drawn(page, Width=128, Guided_at="3,1")
        == "guidance_interval 3,1 must be two sigma / alpha, low, high; None: no end"
    )
    assert drawn(page, Guided_at="", Pictures=0) == "num_images must be at least 1, got 0"
    filled(page, Pictures=1)
    page.get_by_role("button", name="Reuse last").click()
    page.get_by_role("alert").filter(has_text="no picture is chosen").wait_for()
    assert drawn(page, Guided_at="", Steps="").startswith("Done: ")


def test_enter_draws_in_any_field(page):
    for label, text in (("Prompt", "red apple"), ("Seed", "21"), ("Steps", "3")):
        before = page.locator("#command textarea").input_value()
        field = page.get_by_label(label, exact=True)
        field.fill(text)
        field.press("Enter")
        page.wait_for_function("line => document.querySelector('#command textarea').value != line", arg=before)
        assert field.input_value() == text
    assert "--seed 21" in page.locator("#command textarea").input_value()
    assert "--steps 3 " in page.locator("#command textarea").input_value()


def test_the_line_is_copied_where_a_browser_has_no_clipboard(page, site):
    page.add_init_script("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    page.reload()
    copy = page.get_by_role("button", name="Copy the command line")
    copy.click()
    page.get_by_text("There is no command line yet").wait_for()
    drawn(page, Prompt="red apple", Steps=2)
    copy.click()
    page.get_by_text("The command line is copied.").wait_for()
    page.get_by_label("Prompt", exact=True).fill("")
    page.keyboard.press("ControlOrMeta+V")
    assert page.get_by_label("Prompt", exact=True).input_value() == page.locator("#command textarea").input_value()


def test_the_folder_is_shown_wherever_it_is_and_only_its_pictures(page, site):
    url, output, _ = site
    assert drawn(page, Prompt="red apple", Steps=2).startswith("Done: ")
    sizes = "[...document.querySelectorAll('#gallery img, #picture img')].map(image => image.naturalWidth)"
    page.wait_for_function(f"{sizes}.length > 1 && {sizes}.every(Boolean)")
    for text in (output / "secret.txt", output / "inputs" / "secret.txt"):
        text.parent.mkdir(exist_ok=True)
        text.write_text("a secret")
        assert page.request.get(f"{url}gradio_api/file={text}").status == 403, "whatever else lies there"


def test_a_file_that_is_no_picture_is_told_and_the_others_are_shown(page, site):
    assert drawn(page, Prompt="red apple", Seed=31, Steps=2).startswith("Done: ")
    whole = newest(site[1])
    broken = {"text.png": b"no picture", "half.png": whole.read_bytes()[:-4000], "empty.png": b""}
    for n, (name, content) in enumerate(broken.items()):
        (site[1] / name).write_bytes(content)
        os.utime(site[1] / name, (2**32 - n, 2**32 - n))
    page.reload()
    page.get_by_label("Prompt", exact=True).wait_for()
    for n, name in enumerate([*broken, whole.name, *broken]):
        page.locator("#gallery button").nth(n % 4).click()
        page.locator("#facts").get_by_text(name).wait_for()
        told = page.locator("#facts [role=alert]")
        assert told.count() == page.locator("#picture img").count() ^ 1 == (name in broken)
        assert not told.count() or f"{name}: cannot be read as a picture" in told.inner_text()
    assert not page.locator(".toast-body").count()
    page.get_by_role("button", name="Reuse last").click()
    page.locator("#status [role=alert]").filter(has_text="empty.png: cannot be read as a picture").wait_for()
    for name in broken:
        (site[1] / name).unlink()


# The command, with an autoencoder that fails in bfloat16; and a step of more than a thousand takes a minute.
TROUBLED = """
import sys, time
from diffusion.cli import main, ui
from diffusion.models import networks
from diffusion.studio import Studio
ui.PATIENCE, finite, saved = 0.5, networks.finite, Studio._saved
networks.finite = lambda values: finite(values if str(values.dtype) == "torch.float32" else values / 0)
Studio._saved = lambda studio, step: time.sleep(60 * (step.total == 1000)) or saved(studio, step)
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def troubled(window, tiny_model, tmp_path_factory):
    output = tmp_path_factory.mktemp("troubled") / "drawn"
    with served(tiny_model, output, "--dtype", "bf16", program=("-c", TROUBLED)) as (url, process):
        yield url, output, process


def test_a_repair_is_told_at_the_end_and_later(window, troubled):
    url, output, _ = troubled
    page = opened(window, url)
    said = drawn(page, Prompt="red cat", Pictures=2)
    first, second = sorted(output.glob("*.png"))
    (repair,) = made(second)["repairs"]
    assert "float32" in repair
    assert said == f"Done: {first}, and 1 more; {repair}", "once"
    assert f"Repaired\n{repair}" in page.locator("#facts").inner_text()
    page.reload()
    page.locator("#gallery button").first.click()
    page.locator("#facts").get_by_text(repair).wait_for()
    page.close()


def test_drawings_are_stopped_however_many_wait(page, site):
    before = sorted(site[1].glob("*.png"))
    filled(page, Prompt="red apple", Steps=999)
    for _ in range(11):
        page.get_by_role("button", name="Draw", exact=True).click()
    page.locator("#status progress").wait_for()
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("Stopped: no picture").wait_for()
    assert sorted(site[1].glob("*.png")) == before


def test_what_is_drawn_right_after_a_stop_is_drawn_and_the_stopped_is_not(page, site):
    before = set(site[1].glob("*.png"))
    draw = page.get_by_role("button", name="Draw", exact=True)
    filled(page, Prompt="red apple", Seed=41, Steps=999)
    draw.click()
    page.locator("#status progress:not([value='0'])").wait_for()
    filled(page, Prompt="rocket", Seed=42, Steps=2)
    page.evaluate(
        """for (const name of ["Stop", "Draw"])
        [...document.querySelectorAll("button")].find(button => button.innerText == name).click()"""
    )
    page.get_by_text("Done: ").wait_for()
    (path,) = set(site[1].glob("*.png")) - before
    assert (made(path)["prompt"], made(path)["seed"]) == ("rocket", 42)


@pytest.mark.parametrize(("width", "height"), [tuple(DESK.values()), (700, 900), (390, 844)])
def test_every_field_has_a_name_and_the_page_its_place(page, width, height):
    page.set_viewport_size({"width": width, "height": height})
    page.emulate_media(color_scheme="dark")
    page.reload()
    page.get_by_role("tab", name="Begin from a picture").click()
    page.locator("#editor canvas").first.wait_for()
    nameless = page.evaluate(
        """[...document.querySelectorAll("input, textarea, select, button")].filter(field =>
        field.type != "hidden" && !(field.labels ?? []).length && !field.ariaLabel && !field.title &&
        !field.innerText.trim()).map(field => field.outerHTML)"""
    )
    assert not nameless
    across, down = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.scrollHeight]")
    assert across == width
    assert down <= height or width < 1000, "one screen on a desk"
    row = [page.get_by_role("button", name=name).bounding_box()["y"] for name in ("Random", "Reuse last")]
    assert row[0] == row[1]
    drawn(page, Prompt="red apple", Steps=2)
    page.wait_for_function("document.getElementById('status').getBoundingClientRect().bottom <= innerHeight")


# Last, for it ends what the others look at.
@pytest.mark.parametrize("where", ["site", "troubled"], ids=["between steps", "within a long one"])
def test_ctrl_c_ends_it_in_the_middle_of_a_drawing(request, window, where):
    url, output, process = request.getfixturevalue(where)
    stderr = Path(f"{output}.stderr")
    page = opened(window, url)
    filled(page, Prompt="red cat", Steps=1000)
    page.get_by_role("button", name="Draw", exact=True).click()
    page.locator("#status progress").wait_for()
    before = stderr.read_text()
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    assert stderr.read_text() == before, "not a word, though a page is open"
    page.close()
