"""A page to try a model: draw by seed and class in one, two and four steps, complete a picture, colour and enlarge it.

    python -m cm.tools.demo RUN [--port 7860]

The page is for this machine only, unless --host says otherwise. gradio (extra `demo`) makes it; it sends nothing home.
"""

import argparse
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cm.config.derived import last_known
from cm.config.parsing import expanded
from cm.config.rows import OBJECTIVES
from cm.config.scripts import SampleConfig, configure
from cm.data.images import from_uint8, make_grid, to_uint8
from cm.errors import UserError, extra
from cm.models.pretrained import Pretrained, load_pretrained
from cm.runtime import job
from cm.sampling.editing import LinearEdit, colorize, edit_images, inpaint, luma, superres
from cm.sampling.levels import spread, ts_to_sigmas
from cm.sampling.noise import IndexedGenerator
from cm.sampling.registry import run_sampler

EVALUATIONS = (1, 2, 4)  # of a consistency model, side by side
POINTS = (5, 9, 18)  # of a denoiser's grid
EDIT_LEVELS = 17
RESULTS = 4
MOST = 64  # images at a time
IN_TURN = -1  # in place of a class
# Titles stand above pictures: a label of gradio's would cover their corner
SHOWN = {"interactive": False, "format": "png", "buttons": ["download", "fullscreen"], "show_label": False}
EXACT = 1e-6  # to_uint8 truncates: without it a known pixel may lose a grey level to rounding
# Sides of pictures on the page, about: the one that is painted on, and those of a row of results [pixels]
EDITOR, ROW = 256, 160


class Tried:
    """A model and what the page can do with it. Pictures are arrays (H, W, 3) uint8; results are Pillow images."""

    def __init__(self, model: Pretrained[SampleConfig]):
        self.model, c = model, model.config
        self.side, self.channels = c.image_size, c.in_channels or 3
        self.classes = c.num_classes if c.class_cond else 0
        self.row = OBJECTIVES[c.training_mode]
        self.consistency = self.row.consistency
        self.factors = [f for f in range(2, self.side) if self.side % f == 0]

    @property
    def title(self) -> str:
        """What the model is, in one line."""
        c = self.model.config
        kind = {1: "grey", 3: "colour"}.get(self.channels, f"{self.channels} channels")
        classes = f", {self.classes} classes" if self.classes else ""
        return f"{c.training_mode.replace('_', ' ')}: {kind}, {self.side} x {self.side}{classes}"

    @property
    def class_choices(self) -> list[tuple[str, int]]:
        """(what a class is called, its number); the first takes them in turn."""
        names = self.model.config.class_names
        return [("in turn", IN_TURN), *((names[i] if names else str(i), i) for i in range(self.classes))]

    @property
    def columns(self) -> list[str]:
        """Titles of the ways to draw that stand side by side."""
        if self.consistency or self.row.two_times or self._few:
            return [f"{n} step{'s' * (n > 1)}" for n in self._ways()]
        return [f"Heun, {n} points, {2 * n - 1} evaluations" for n in POINTS]

    @property
    def _few(self) -> bool:
        """Whether the model was trained for one small number of steps of its own sampler."""
        return self.row.stages or self.row.segments

    def _ways(self) -> Sequence[int]:
        if self._few:
            return [self.model.config.steps]
        if self.row.two_times:
            return EVALUATIONS
        if not self.consistency:
            return POINTS
        return [n for n in EVALUATIONS if n < self.model.config.steps]

    def _levels(self, evaluations: int) -> Tensor:
        """Evenly over the grid of training, with its end."""
        c = self.model.config
        ts = spread(evaluations, c.steps, last_known(c, c.steps))
        return ts_to_sigmas(ts, c.steps, c.sigma_min, c.sigma_max, c.rho)

    def draw(self, seed: float | None, label: int, count: float) -> list[Any]:
        """A grid per column, all from the same noise; label IN_TURN takes the classes in turn."""
        count = max(1, min(MOST, int(count)))
        return [grid(self.sample(n, seed, label, count)) for n in self._ways()]

    def draw_one(self, seed: float | None, label: int) -> np.ndarray:
        """One image (H, W, C) uint8, drawn with the most steps that the page shows."""
        return to_uint8(self.sample(self._ways()[-1], seed, label, 1))[0].cpu().numpy()

    @torch.no_grad()
    def sample(self, way: int, seed: float | None, label: int, count: int) -> Tensor:
        """Images (count, C, H, W) in [-1, 1], by so many evaluations, or points of a denoiser's grid."""
        c = self.model.config
        generator = IndexedGenerator(int(seed or 0), "demo")
        generator.set_rows(range(count))
        x = (
            generator.randn(count, self.channels, self.side, self.side, device=self.model.device)
            * c.sigma_max
        )
        denoise = self.model.denoise(self._labels(label, count))
        if self.consistency:
            grid_of = {"steps": c.steps, "sigmas": self._levels(way)}
            return run_sampler("multistep", denoise, x, generator, sigma_min=c.sigma_min, **grid_of)
        grid_of = {"steps": way, "sigma_min": c.sigma_min, "sigma_max": c.sigma_max, "rho": c.rho}
        own = self._few or self.row.two_times
        return run_sampler(self.row.sampler if own else "heun", denoise, x, generator, **grid_of)

    def _labels(self, label: int, count: int) -> Tensor | None:
        if not self.classes:
            return None
        in_turn = torch.arange(count) % self.classes
        return in_turn if label == IN_TURN else torch.full((count,), int(label))

    def complete(self, picture: np.ndarray, painted: np.ndarray, label: int, seed: float | None) -> Any:
        """What is painted (H, W) is drawn anew, all other pixels of the fitted picture stay: seen | results."""
        image = self.fit(picture)
        unknown = torch.from_numpy(fitted(painted.astype(np.uint8)[..., None] * 255, self.side)[..., 0] > 0)
        return self.edit(inpaint((~unknown).double()), image, label, seed, unknown)

    def edit(
        self, task: LinearEdit, image: Tensor, label: int, seed: float | None, unknown: Tensor | None = None
    ) -> Any:
        """A row of pictures: what the task sees of an image (C, H, W), then results."""
        images = image.expand(RESULTS, -1, -1, -1).to(self.model.device)
        generator = IndexedGenerator(int(seed or 0), "demo edit")
        generator.set_rows(range(RESULTS))
        denoise = self.model.denoise(self._labels(label, RESULTS))
        results = edit_images(
            denoise, images, self._levels(EDIT_LEVELS), generator, task, sigma_min=self.model.config.sigma_min
        )
        seen = task.measure(images[:1])
        if unknown is None and self.channels == 3 and task.mask.shape == (3, 1, 1):
            seen = luma(images[:1])
        row = torch.cat([seen, results])
        zoom = max(1, ROW // self.side)
        return grid(row.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3), columns=RESULTS + 1)

    def fit(self, picture: np.ndarray) -> Tensor:
        """A picture of any size as an image (C, H, W) of the model: its central square, by means of pixels."""
        pixels = fitted(picture[..., :3], self.side)
        if self.channels == 1:
            pixels = pixels.mean(-1, keepdims=True).round().astype(np.uint8)
        return from_uint8(pixels[None])[0]


def fitted(picture: np.ndarray, side: int) -> np.ndarray:
    """The central square of (H, W, C) uint8 as (side, side, C), by means of the pixels that fall together."""
    from PIL import Image

    height, width = picture.shape[:2]
    size = min(height, width)
    top, left = (height - size) // 2, (width - size) // 2
    square = np.ascontiguousarray(picture[top : top + size, left : left + size])
    planes = [Image.fromarray(square[..., i]) for i in range(square.shape[-1])]
    return np.stack([np.asarray(p.resize((side, side), Image.Resampling.BOX)) for p in planes], axis=-1)


def grid(images: Tensor, columns: int = 0) -> Any:
    """Images as one Pillow picture."""
    return make_grid(to_uint8(images.clamp(-1, 1) + EXACT).cpu(), columns)


def page(tried: Tried) -> Any:
    """The gradio page."""
    # Before it is imported: it would ask its makers for the newest version, and tell them of this page.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import gradio as gr
    except ImportError:
        raise UserError(f"the page needs gradio: {extra('demo')}") from None

    def chosen_class() -> Any:
        return gr.Dropdown(tried.class_choices, value=IN_TURN, label="class", visible=bool(tried.classes))

    file = tried.model.file
    with gr.Blocks(title=tried.title, analytics_enabled=False) as blocks:
        gr.Markdown(f"## {tried.title}\n{file.path}" + f" ({file.kind})" * (file.kind != "file"))
        with gr.Tab("Draw"):
            with gr.Row():
                seed, label = gr.Number(0, label="seed", precision=0), chosen_class()
                count = gr.Slider(1, MOST, value=16, step=1, label="images")
            button = gr.Button("Draw", variant="primary", elem_id="draw")
            shown = []
            with gr.Row():
                for i, name in enumerate(tried.columns):
                    with gr.Column(min_width=ROW):
                        gr.Markdown(f"**{name}**")
                        shown.append(gr.Image(label=name, **SHOWN, elem_id=f"drawn{i}"))
            drawing = {"fn": tried.draw, "inputs": [seed, label, count], "outputs": shown}
            button.click(**drawing, api_name="draw")
            blocks.load(**drawing, api_visibility="private")
        if tried.consistency:
            edit_tabs(gr, tried, chosen_class)
    return blocks


def edit_tabs(gr: Any, tried: Tried, chosen_class: Any) -> None:
    """The tabs of tasks that start from a picture."""
    zoom = max(1, EDITOR // tried.side)

    def start(seed: float | None, label: int) -> np.ndarray:
        drawn = tried.draw_one(seed, label).repeat(zoom, 0).repeat(zoom, 1)
        return drawn.repeat(3 // drawn.shape[-1], -1)

    def choices(name: str) -> tuple[Any, Any, Any]:
        """Seed, class, and the button that brings a picture of the model."""
        with gr.Row(equal_height=True):
            seed, label = gr.Number(0, label="seed", precision=0), chosen_class()
            return seed, label, gr.Button("A picture of the model", elem_id=name)

    def result(name: str) -> Any:
        gr.Markdown("**what the model sees, then what it makes of it**")
        return gr.Image(label="result", **SHOWN, elem_id=name)

    with gr.Tab("Complete"):
        gr.Markdown("Paint on the picture: what is painted is drawn anew, every other pixel stays.")
        seed, label, fresh = choices("fresh")
        brush = gr.Brush(colors=["#ff0000"], color_mode="fixed")
        editor = gr.ImageEditor(type="numpy", label="picture", show_label=False, brush=brush)
        button = gr.Button("Complete", variant="primary", elem_id="complete")
        completed = result("completed")
        fresh.click(start, [seed, label], editor, api_name="picture")

        def complete(value: dict[str, Any] | None, label: int, seed: float | None) -> Any:
            background = given(gr, value and value["background"])
            layers = [layer[..., 3] > 0 for layer in value["layers"]]
            painted = np.any(layers, axis=0) if layers else np.zeros(background.shape[:2], bool)
            return tried.complete(background, painted, label, seed)

        button.click(complete, [editor, label, seed], completed, api_name="complete")
    with gr.Tab("Colour and enlarge" if tried.channels == 3 else "Enlarge"):
        seed, label, fresh = choices("fresh2")
        picture = gr.Image(type="numpy", label="picture", show_label=False, height=EDITOR + 40, format="png")
        factors, visible = tried.factors, bool(tried.factors)
        factor = gr.Dropdown(factors, value=(factors or [None])[0], label="factor", visible=visible)

        def enlarge(picture: np.ndarray | None, label: int, seed: float | None, factor: int) -> Any:
            return tried.edit(superres(int(factor)), tried.fit(given(gr, picture)), label, seed)

        def colour(picture: np.ndarray | None, label: int, seed: float | None) -> Any:
            return tried.edit(colorize(), tried.fit(given(gr, picture)), label, seed)

        with gr.Row():
            larger = gr.Button("Enlarge", variant="primary", elem_id="enlarge", visible=visible)
            coloured = gr.Button("Colour", variant="primary", visible=tried.channels == 3)
        made = result("enlarged")
        fresh.click(start, [seed, label], picture, api_visibility="private")
        larger.click(enlarge, [picture, label, seed, factor], made, api_name="enlarge")
        if tried.channels == 3:
            coloured.click(colour, [picture, label, seed], made, api_name="colour")


def given(gr: Any, picture: np.ndarray | None) -> np.ndarray:
    """The picture of an edit; where there is none, the page says so."""
    if picture is None:
        raise gr.Error("first load a picture, or take one of the model", duration=8, print_exception=False)
    return picture


def main(argv: Sequence[str] | None = None) -> None:
    """Serve the page until Ctrl-C."""
    parser = argparse.ArgumentParser(prog="cm demo", description=__doc__.splitlines()[0])
    parser.add_argument(
        "model", metavar="RUN", type=expanded, help="run directory, checkpoint or weights file"
    )
    parser.add_argument("--weights", default="", help="raw, ema:RATE or target; empty: the slowest average")
    parser.add_argument("--training_mode", default="", help="objective of a file that does not say it")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve (default: this machine only)")
    parser.add_argument("--port", type=int, default=7860, help="default: 7860")
    options = parser.parse_args(argv)
    given = {"training_mode": options.training_mode} if options.training_mode else {}
    config = configure(SampleConfig, model_path=options.model, weights=options.weights, **given)
    blocks = page(Tried(load_pretrained(config)))
    serve(blocks, options.host, options.port)


def serve(blocks: Any, host: str, port: int, *, wait: bool = True) -> str:
    """Serve a page at a port of an address; its address. UserError where the port is taken."""
    try:
        _, address, _ = blocks.launch(
            server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=True
        )
    except OSError as error:
        raise UserError(
            f"--port {port}: {host}:{port} cannot be served ({str(error).splitlines()[0]})"
        ) from None
    print(f"{address}  (Ctrl-C ends it)", flush=True)
    if wait:
        blocks.block_thread()
    return address


if __name__ == "__main__":
    job.run_main(main)
