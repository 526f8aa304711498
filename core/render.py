"""Pictures of episodes without a display, and without knowing any environment by its name.

An environment that can be drawn has `draw(state) -> Scene`: from one state of numpy arrays, the visible rectangle and
what lies in it, back to front. A Circle with a label is an agent: it leaves a trail, and its label and colour are
those of its return curve, the i-th labelled circle being agent i. What an environment does not know (a belief, a
plan) the caller appends to `scene.shapes`.

    frames = film(scenes(env, states), reward)   states [T + 1], reward [T] or [T, N] -> [T + 1, H, W, 3] uint8
    write_gif("episode.gif", frames, fps=10)
"""
import io
import os
import subprocess
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from core import files
from core.errors import UserError

Colour = tuple[int, int, int]
WHITE, GREY, BLACK = (255, 255, 255), (150, 150, 150), (30, 30, 30)
BLUE, ORANGE, GREEN, RED = (0, 114, 178), (230, 159, 0), (0, 158, 115), (200, 30, 30)
PALETTE = (BLUE, (213, 94, 0), (204, 121, 167), (86, 180, 233), ORANGE, (120, 94, 60), (110, 60, 160), BLACK)
REDS = ((213, 60, 40), (150, 20, 60), (240, 130, 90), (110, 40, 20))
SCALE = 2  # drawn this much larger, then averaged down: smooth edges


class Circle(NamedTuple):
    centre: Any  # (x, y), in the environment's units as everything here
    radius: float
    colour: Colour
    filled: bool = True
    label: str = ""  # of an agent


class Line(NamedTuple):
    points: Any  # [K, 2]; an outline ends where it began
    colour: Colour
    width: float = 2.0  # pixels


class Text(NamedTuple):
    place: Any  # (x, y) of the left end, half way up
    text: str
    colour: Colour


class Scene(NamedTuple):
    low: Any  # (x, y) of the lower left corner
    high: Any
    shapes: list[Circle | Line | Text]


def scenes(env: Any, states: Any) -> list[Scene]:
    """One Scene for each state of a trajectory, whose leaves are [T, ...]."""
    states = jax.device_get(states)
    length = len(jax.tree.leaves(states)[0])
    return [env.draw(jax.tree.map(lambda x, t=t: x[t], states)) for t in range(length)]


def ellipse(mean: np.ndarray, cov: np.ndarray, colour: Colour, deviations: float = 2.0) -> Line:
    """The contour of N(mean [2], cov [2, 2]) so many standard deviations out."""
    angle = np.linspace(0, 2 * np.pi, 49)
    values, vectors = np.linalg.eigh(cov)
    circle = np.stack([np.cos(angle), np.sin(angle)], axis=1) * np.sqrt(np.maximum(values, 0))
    return Line(mean + deviations * circle @ vectors.T, colour)


def gaussians(named: dict[str, tuple[np.ndarray, np.ndarray]], width: float, caption: str) -> Scene:
    """{name: (mean [2], cov [2, 2])}, each as two standard deviations in a colour of its own, around a cross at 0."""
    w = width / 2
    shapes = [Line([(-w, 0), (w, 0)], GREY, 1), Line([(0, -w), (0, w)], GREY, 1),
              Text((-0.95 * w, -0.93 * w), caption, BLACK)]
    for i, (name, (mean, cov)) in enumerate(named.items()):
        colour = PALETTE[i % len(PALETTE)]
        shapes += [ellipse(mean, cov, colour), Circle(mean, 0.015 * w, colour, label=name),
                   Text((-0.95 * w, (0.93 - 0.09 * i) * w), name, colour)]
    return Scene((-w, -w), (w, w), shapes)


def film(scenes: Sequence[Scene], reward: np.ndarray | None = None, height: int = 384, trail: int = 25) -> np.ndarray:
    """[T, H, W, 3] uint8: the scenes seen by a resting camera, and beside them the returns so far.

    reward [T − 1] or [T − 1, N] is what the step into each scene but the first paid.
    """
    low, high = np.min([s.low for s in scenes], axis=0), np.max([s.high for s in scenes], axis=0)
    scale = SCALE * height / (high[1] - low[1])
    width = SCALE * even((high[0] - low[0]) * scale / SCALE)
    agents = [[shape for shape in scene.shapes if isinstance(shape, Circle) and shape.label] for scene in scenes]
    paths = np.array([[a.centre for a in row] for row in agents], float).reshape(len(scenes), -1, 2)

    def pixels(points):  # y grows upwards in the world and downwards in a picture
        return (np.asarray(points, float) - (low[0], high[1])) * (scale, -scale)

    images = []
    curves = None if reward is None else Curves(agents[0], reward, SCALE * height)
    for t, scene in enumerate(scenes):
        image = Image.new("RGB", (width + (curves.width if curves else 0), SCALE * height), WHITE)
        draw = ImageDraw.Draw(image)
        for i, agent in enumerate(agents[t]):
            draw_trail(draw, pixels(paths[max(0, t - trail):t + 1, i]), agent.colour)
        for shape in scene.shapes:
            draw_shape(draw, shape, pixels, scale)
        if curves:
            curves.draw(draw, width, t)
        images.append(np.asarray(image.reduce(SCALE)))
    return np.stack(images)


def even(x: float) -> int:
    """H.264 halves the resolution of colour, so sides are even."""
    return 2 * round(x / 2)


def draw_shape(draw: ImageDraw.ImageDraw, shape: Circle | Line | Text, pixels: Any, scale: float) -> None:
    if isinstance(shape, Text):
        font = ImageFont.load_default(12 * SCALE)
        return draw.text(tuple(pixels(shape.place)), shape.text, shape.colour, font, anchor="lm")
    if isinstance(shape, Line):
        draw.line([tuple(p) for p in pixels(shape.points)], shape.colour, round(SCALE * shape.width), "curve")
        return
    (x, y), radius = pixels(shape.centre), max(shape.radius * scale, 2 * SCALE)
    outline = dict(fill=shape.colour) if shape.filled else dict(outline=shape.colour, width=2 * SCALE)
    draw.ellipse([x - radius, y - radius, x + radius, y + radius], **outline)


def draw_trail(draw: ImageDraw.ImageDraw, points: np.ndarray, colour: Colour) -> None:
    """A line through points [K, 2] that fades towards its first."""
    for age, (a, b) in enumerate(zip(points[-2::-1], points[:0:-1], strict=True)):
        fade = 0.35 + 0.6 * age / len(points)
        faded = tuple(round(c + (255 - c) * fade) for c in colour)
        draw.line([*a, *b], faded, 2 * SCALE)


class Curves:
    """The panel of returns: one line for each agent, growing with the episode."""

    def __init__(self, agents: list[Circle], reward: np.ndarray, height: int):
        reward = np.asarray(reward, float).reshape(len(reward), -1)
        self.returns = np.concatenate([np.zeros((1, reward.shape[1])), reward.cumsum(axis=0)])
        names = [(a.label, a.colour) for a in agents[:reward.shape[1]]]
        self.names = names if len(names) == reward.shape[1] else [("return", BLUE)] * reward.shape[1]
        self.font = ImageFont.load_default(12 * SCALE)
        self.width, self.height, self.line = 256 * SCALE, height, 16 * SCALE
        self.top = 2 * self.line + self.line * len(self.names)

    def draw(self, draw: ImageDraw.ImageDraw, left: int, t: int) -> None:
        draw.rectangle([left, 0, left + self.width, self.height], WHITE)  # no shape reaches out of the arena
        margin, bottom = 3 * self.line, self.height - 2 * self.line
        low, high = self.returns.min(), self.returns.max()
        x = left + np.linspace(margin, self.width - self.line, len(self.returns))
        y_scale = (bottom - self.top) / max(high - low, 1e-9)
        y, zero = bottom - (self.returns - low) * y_scale, bottom + low * y_scale
        draw.line([x[0], zero, x[-1], zero], (220, 220, 220), SCALE)
        draw.line([x[0], self.top, x[0], bottom, x[-1], bottom], GREY, SCALE)
        for value, anchor_y in ((high, self.top), (low, bottom)):
            draw.text((x[0] - SCALE * 4, anchor_y), f"{value:.1f}", BLACK, self.font, anchor="rm")
        draw.text((x[0], bottom + SCALE * 4), f"step {t}", BLACK, self.font, anchor="la")
        for i, (label, colour) in enumerate(self.names):
            row = self.line * (i + 1)
            draw.text((x[0], row), label, colour, self.font, anchor="lm")
            draw.text((x[-1], row), f"{self.returns[t, i]:+.2f}", colour, self.font, anchor="rm")
            if t:
                draw.line(np.stack([x[:t + 1], y[:t + 1, i]], axis=1).ravel().tolist(), colour, 2 * SCALE, "curve")


def write_gif(path: str | os.PathLike, frames: np.ndarray, fps: float = 10) -> None:
    """frames [T, H, W, 3] uint8; one palette of 64 colours for all of them, no dithering: small, and still."""
    sample = frames[np.linspace(0, len(frames) - 1, min(len(frames), 8)).astype(int)]
    palette = Image.fromarray(np.concatenate(sample)).quantize(64, Image.Quantize.MAXCOVERAGE, kmeans=1)
    first, *rest = [Image.fromarray(f).quantize(palette=palette, dither=Image.Dither.NONE) for f in frames]
    film = io.BytesIO()
    first.save(film, "GIF", save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)
    files.write(path, film.getvalue())


def write_mp4(path: str | os.PathLike, frames: np.ndarray, fps: float = 10) -> None:
    """frames [T, H, W, 3] uint8, H and W even."""
    try:
        import imageio_ffmpeg
    except ImportError as error:
        raise ImportError("an MP4 needs imageio-ffmpeg: pip install imageio-ffmpeg") from error
    size = f"{frames.shape[2]}x{frames.shape[1]}"
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", size, "-r", str(fps), "-i", "-"]
    with files.replacing(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)  # JAX warns of any; this one only starts a program
        done = subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", *source, "-pix_fmt", "yuv420p",
                               "-f", "mp4", temporary], input=frames.tobytes(), capture_output=True)
        if done.returncode:  # a full disk, most likely
            raise UserError(f"{path}: {' '.join(done.stderr.decode(errors='replace').split())}")
