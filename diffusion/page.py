"""The page of ``diffusion ui``: what a ``Studio`` does, in a browser. Everything in it comes from this machine."""

import html
import logging
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image, ImageChops

from diffusion import canvas
from diffusion.images import read_metadata
from diffusion.names import SAMPLERS, SCHEDULES
from diffusion.notices import reason
from diffusion.parameters import parse_parameters
from diffusion.pixels import read_size
from diffusion.studio import Form, Seen, Studio, troubles
from diffusion.style import COPY, LOOK, STYLE
from diffusion.values import Source

FIELDS = tuple(item.name for item in fields(Form) if item.name not in ("init_image", "mask"))
SHELF = 60  # thumbnails
FONTS = {
    "font": [gr.themes.Font("system-ui"), "sans-serif"],
    "font_mono": [gr.themes.Font("ui-monospace"), "monospace"],
}
HIDDEN = ("Model hash", "RNG", "Version")  # of the facts of a picture, what says nothing to look at
WIDE = 24  # letters of a fact that has a line of its own
CANVAS = 512  # pixels of the empty editor
PAINT = "#4f46e5"  # only how opaque it is counts
BLANK = Image.new("RGB", (8, 8), "#cbd5e1")  # on the shelf, of a file that is no picture

Updates = dict[Any, Any]


def show(studio: Studio, host: str, port: int, *, browser: bool) -> None:
    """Serve the page until Ctrl-C. OSError if the port is taken meanwhile."""
    page = Page(studio)
    page.blocks.queue(default_concurrency_limit=8)  # the studio draws one after the other; the others are told to wait
    try:
        _, url, _ = page.blocks.launch(
            server_name=host,
            server_port=port,
            inbrowser=browser,
            prevent_thread_lock=True,
            share=False,
            quiet=True,
            ssr_mode=False,
            enable_monitoring=False,
            footer_links=[],
            theme=gr.themes.Default(
                primary_hue="indigo", neutral_hue="slate", spacing_size="sm", text_size="sm", **FONTS
            ),
            css=STYLE,
        )
        page.blocks.server.force_exit = True  # at the end, where it would wait for every page that is open
        print(url, flush=True)
        if host not in ("127.0.0.1", "localhost", "::1"):
            print("diffusion ui: whoever reaches this machine can draw here, and see the pictures", file=sys.stderr)
        threading.Event().wait()
    finally:
        studio.closed = True
        logging.getLogger("uvicorn.error").disabled = True  # which tells of each page that it has cut off
        page.blocks.close(verbose=False)


class Page:
    """The widgets, and what happens when they are touched."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        self.stops: set[tuple[str, threading.Event]] = set()  # by session: what ends a drawing
        with gr.Blocks(title="diffusion", analytics_enabled=False, fill_width=True) as self.blocks:
            gr.HTML(f"<h1>diffusion</h1><p>{html.escape(studio.title)}</p>", elem_id="title")
            with gr.Row(elem_id="desk"):
                with gr.Column(scale=5, min_width=300, elem_id="asked"):
                    self._ask(Form.of(studio.model.model.recipe))
                with gr.Column(scale=8, min_width=320, elem_id="drawn"):
                    self._easel()
                with gr.Column(scale=5, min_width=300, elem_id="kept"):
                    self._shelf()
            self._wire()

    # --- what is there

    def _ask(self, own: Form) -> None:
        """The fields, and the buttons that draw and stop."""
        made: dict[str, Any] = {
            "prompt": gr.Textbox(
                "", label="Prompt", placeholder="a red apple", max_lines=4, autofocus=True, elem_id="prompt"
            ),
            "negative_prompt": gr.Textbox("", label="Negative prompt", placeholder="what to keep away from"),
        }
        with gr.Row():
            self.go = gr.Button("Draw", variant="primary", scale=3, min_width=90)
            self.stop = gr.Button("Stop", scale=1, min_width=60)
        with gr.Row(elem_id="seed-row"):
            made["seed"] = gr.Textbox("", label="Seed", placeholder="random", max_lines=1, scale=4, min_width=110)
            self.random = gr.Button("Random", size="sm", scale=1, min_width=70)
            self.reuse = gr.Button("Reuse last", size="sm", scale=1, min_width=84)
        with gr.Row():
            made["steps"] = gr.Number(own.steps, label="Steps", min_width=70)
            made["guidance_scale"] = gr.Number(own.guidance_scale, label="Guidance", step=0.5, min_width=70)
            made["guidance_interval"] = gr.Textbox(
                own.guidance_interval, label="Guided at", placeholder="everywhere", max_lines=1, min_width=70
            )
        with gr.Row():
            made["width"] = gr.Number(own.width, label="Width", step=8, min_width=70)
            made["height"] = gr.Number(own.height, label="Height", step=8, min_width=70)
            made["num_images"] = gr.Number(1, label="Pictures", min_width=70)
        with gr.Row():
            made["sampler"] = gr.Dropdown(_choices(SAMPLERS), value=own.sampler, label="Sampler", min_width=100)
            made["schedule"] = gr.Dropdown(_choices(SCHEDULES), value=own.schedule, label="Schedule", min_width=100)
        self.fields = made

    def _easel(self) -> None:
        """What is drawn, and what it is drawn from."""
        with gr.Tabs() as self.tabs:
            with gr.Tab("Drawing", id="drawing"):
                self.picture = gr.Image(
                    label="The picture",
                    show_label=False,
                    interactive=False,
                    height=404,
                    buttons=["download", "fullscreen"],
                    elem_id="picture",
                )
            with gr.Tab("Begin from a picture", id="beginning"):
                self.editor = gr.ImageEditor(
                    label="A picture to begin from; what is painted over is drawn anew",
                    show_label=False,
                    type="pil",
                    sources=("upload", "clipboard"),
                    transforms=(),
                    layers=False,
                    height=336,
                    canvas_size=(CANVAS, CANVAS),
                    brush=gr.Brush(colors=[PAINT], default_color=PAINT, color_mode="fixed"),
                    format="png",
                    image_mode="RGBA",
                    placeholder="Drop a picture here\nand paint over what is to change",
                    buttons=[],
                    elem_id="editor",
                )
                self.fields["strength"] = gr.Textbox(
                    "", label="Strength", placeholder="how much is drawn anew: 0.75, with paint 1", max_lines=1
                )
        self.status = gr.HTML(_note("Ready."), elem_id="status")
        self.command = gr.Textbox(
            label="The command line that draws this again",
            lines=3,
            max_lines=8,
            interactive=False,
            elem_id="command",
        )
        self.copy = gr.Button("Copy the command line", size="sm")

    def _shelf(self) -> None:
        """What was drawn before, and how."""
        self.gallery = gr.Gallery(
            label="Pictures",
            show_label=False,
            columns=4,
            height=336,
            object_fit="contain",
            allow_preview=False,
            buttons=[],
            interactive=False,
            elem_id="gallery",
        )
        self.facts = gr.HTML("<p>Click a picture to see how it was made.</p>", elem_id="facts")
        self.back = gr.Button("Put its settings into the fields", size="md")
        self.listed = gr.State([])  # the paths in the gallery
        self.shown = gr.State(None)  # the path of the picture that is looked at

    # --- what happens

    def _wire(self) -> None:
        asked = [*(self.fields[name] for name in FIELDS), self.editor]
        looked = [self.picture, self.facts, self.command, self.shown]
        drawn = [self.picture, self.status, self.gallery, self.listed, self.tabs, self.facts, self.command, self.shown]
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        typed = [field.submit for field in self.fields.values() if not isinstance(field, gr.Dropdown)]  # Enter
        many: dict[str, Any] = {"trigger_mode": "multiple", "concurrency_limit": None}  # all that wait can be stopped
        gr.on([self.go.click, *typed], self._draw, asked, drawn, **many, **quiet)
        gr.on([self.go.click, *typed], None, js=LOOK, **quiet)
        self.stop.click(self._stop, None, None, queue=False, **quiet)
        self.blocks.unload(self._stop)
        self.copy.click(_copied, self.command, self.status, js=COPY, **quiet)
        self.random.click(lambda: "", None, self.fields["seed"], **quiet)
        self.reuse.click(self._reuse, self.shown, [self.fields["seed"], self.status], **quiet)
        self.gallery.select(self._look, self.listed, looked, **quiet)
        self.back.click(self._refill, self.shown, [*asked, self.status], **quiet)
        self.blocks.load(self._browse, None, [self.gallery, self.listed], **quiet)

    def _draw(self, request: gr.Request, *filled: Any) -> Iterator[Updates]:
        seen: Seen | None = None
        with self._stoppable(str(request.session_hash)) as stop:
            yield {
                self.status: _note("Waiting for the drawing before this one ..."),
                self.tabs: gr.Tabs(selected="drawing"),
            }
            try:
                form = _form(filled)
                for seen in self.studio.draw(form, stop.is_set):
                    looks = {} if seen.looks is None else {self.picture: gr.Image(seen.looks, alt_text=form.prompt)}
                    yield looks | {self.status: _progress(seen)}
                yield self._done(seen, stopped=stop.is_set())
            except Exception as error:  # told in the page: no request may end it
                yield {self.status: _wrong(error)} | self._browse()

    @contextmanager
    def _stoppable(self, session: str) -> Iterator[threading.Event]:
        """What ends one drawing, and no other: it is forgotten, and a drawing ended, when nobody looks on any more."""
        stop = threading.Event()
        self.stops.add((session, stop))
        try:
            yield stop
        finally:
            stop.set()
            self.stops.discard((session, stop))

    def _done(self, seen: Seen | None, *, stopped: bool) -> Updates:
        """What is to be seen after a drawing: its first picture, if there is one, and all of them on the shelf."""
        files = [] if seen is None else seen.files
        what = ", ".join([str(path) for path in files[:1]] + ([f"and {len(files) - 1} more"] if len(files) > 1 else []))
        note = f"Stopped: {what or 'no picture'}" if stopped else f"Done: {what}"
        repairs = dict.fromkeys(text for path in files for text in troubles(path)["Repaired"])
        looks = self._picture(files[0], len(files)) if files else {}
        return {self.status: _note("; ".join([note, *repairs]))} | self._browse() | looks

    def _browse(self) -> Updates:
        paths = self.studio.pictures(SHELF)
        return {self.gallery: [(self._thumbnail(path), path.stem) for path in paths], self.listed: paths}

    def _thumbnail(self, path: Path) -> str | Image.Image:
        """What the shelf shows of a file; of one that is no picture an empty square."""
        try:
            read_size(path)
            return self._served(path)
        except (OSError, ValueError):
            return BLANK

    def _served(self, path: Path) -> str:
        """Where the page fetches a picture: a copy, for a folder that gradio may read it lets out with all it holds."""
        return str(self.picture.move_resource_to_block_cache(path))

    def _look(self, listed: Sequence[Path], event: gr.SelectData) -> Updates:
        path = listed[event.index]
        try:
            canvas.read(path)  # to its last pixel: a browser shows what there is of half a file, and says nothing
            return self._picture(path)
        except Exception as error:  # whatever lies in the folder, the others can be looked at
            return {self.picture: None, self.facts: _wrong(error), self.command: "", self.shown: path}

    def _picture(self, path: Path, count: int = 1) -> Updates:
        """A picture with what is known of it; several that were drawn together are looked at as one sheet already."""
        try:
            command = self.studio.command(path, count)
        except Exception as error:  # whatever its record says, it can be looked at
            command = f"# {_line(error)}"
        try:
            facts = _facts(path)
        except Exception as error:
            facts = _wrong(error)
        looks = {self.picture: gr.Image(self._served(path), alt_text=path.stem)} if count == 1 else {}
        return looks | {self.facts: facts, self.command: command, self.shown: path}

    def _stop(self, request: gr.Request) -> None:
        for session, stop in self.stops.copy():
            if session == str(request.session_hash):
                stop.set()

    def _reuse(self, shown: Path | None) -> Updates:
        """The seed of the picture that is looked at."""
        try:
            made = self.studio.recalled(_chosen(shown))
            if made.settings.seed is None:
                raise ValueError(f"{made.path} does not say its seed")
            return {self.fields["seed"]: str(made.settings.seed)}
        except Exception as error:
            return {self.status: _wrong(error)}

    def _refill(self, shown: Path | None) -> Updates:
        """Everything that the picture was asked for with."""
        try:
            made = self.studio.recalled(_chosen(shown))
            form = Form.asking(made.settings)
            editor = None if form.init_image is None else _edited(form.init_image, form.mask)
            note = _note("; ".join(["The fields are those of this picture", *made.notes]) + ".")
            return {self.fields[name]: getattr(form, name) for name in FIELDS} | {
                self.editor: editor,
                self.status: note,
            }
        except Exception as error:
            return {self.status: _wrong(error)}


# --- between widgets and values


def _choices(names: dict[str, str]) -> list[tuple[str, str]]:
    return [(label, name) for name, label in names.items()]


def _form(filled: Sequence[Any]) -> Form:
    """What the widgets hold; a picture without paint has no mask."""
    *values, edited = filled
    form = Form(**dict(zip(FIELDS, values, strict=True)))
    if edited is None or edited["background"] is None:
        return form
    painted = _painted(edited["layers"])
    return replace(form, init_image=edited["background"].convert("RGB"), mask=painted)


def _painted(layers: Sequence[Image.Image]) -> Image.Image | None:
    """White where any layer is covered; None where none is."""
    mask: Image.Image | None = None
    for layer in layers:
        covered = layer.convert("RGBA").getchannel("A")
        mask = covered if mask is None else ImageChops.lighter(mask, covered)
    return mask if mask is not None and mask.getbbox() else None


def _edited(source: Source, mask: Source | None) -> dict[str, Any]:
    """A picture and its mask as the editor holds them."""
    picture = canvas.read(source).convert("RGBA")
    if mask is None:
        return {"background": picture, "layers": [], "composite": picture}
    layer = Image.new("RGBA", picture.size, PAINT)
    layer.putalpha(canvas.read(mask).convert("L").resize(picture.size))
    return {"background": picture, "layers": [layer], "composite": Image.alpha_composite(picture, layer)}


def _chosen(shown: Path | None) -> Path:
    if shown is None:
        raise ValueError("no picture is chosen: draw one, or click one of those that are there")
    return shown


# --- what is said


def _note(text: str) -> str:
    return f'<p role="status">{html.escape(text)}</p>'


def _wrong(error: Exception) -> str:
    return f'<p role="alert">{html.escape(_line(error))}</p>'


def _line(error: Exception) -> str:
    """In one line, as the command line says it: what follows a line break in a picture's record would be pasted too."""
    return " ".join((str(error) if isinstance(error, ValueError) else reason(error)).split())


def _copied(line: str) -> str:
    return _note("The command line is copied." if line else "There is no command line yet: draw a picture.")


def _progress(seen: Seen) -> str:
    return (
        f'<label>step {seen.done} of {seen.total}<progress value="{seen.done}" max="{seen.total}"></progress></label>'
    )


def _facts(path: Path) -> str:
    """What a picture says of itself, as a list."""
    text = read_metadata(path).get("parameters")
    if text is None:
        return f"<h2>{html.escape(path.name)}</h2><p>It does not say how it was made.</p>"
    found = parse_parameters(text)
    title, negative = found.pop("prompt"), found.pop("negative_prompt")
    rows = ({"Negative prompt": negative} if negative else {}) | {k: v for k, v in found.items() if k not in HIDDEN}
    rows |= {name: "; ".join(texts) for name, texts in troubles(path).items() if texts}
    pairs = "".join(_pair(name, text) for name, text in rows.items())
    return f"<h2>{html.escape(title)}</h2><dl>{pairs}</dl><p>{html.escape(path.name)}</p>"


def _pair(name: str, text: str) -> str:
    wide = ' class="wide"' if len(text) > WIDE else ""
    return f"<div{wide}><dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd></div>"
