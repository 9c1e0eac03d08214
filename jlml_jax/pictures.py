"""Ranked lists, curves and activation maps as pictures."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from PIL import Image, ImageDraw

from jlml_jax.augment import normalise
from jlml_jax.datasets.images import save_whole
from jlml_jax.datasets.split import JUNK
from jlml_jax.distances import l2_distances
from jlml_jax.errors import UserError
from jlml_jax.models import JLML
from jlml_jax.protocols import Trial

_CROP, _FRAME, _GAP = (64, 128), 4, 6  # pixels: width and height of a crop, its frame, the space around it
_RIGHT, _WRONG, _QUERY, _PAPER = (28, 148, 72), (206, 44, 44), (90, 90, 90), (255, 255, 255)


def ranked_gallery(trial: Trial, query: int, distances: np.ndarray, top_k: int) -> np.ndarray:
    """The nearest gallery images of one query, int [at most top_k], nearest first.

    `distances` [G] are the query's. As in `metrics`, images that do not count (junk, and the query's own identity and
    camera) are left out, and on equal distances the wrong image comes first.
    """
    gallery = trial.gallery
    same = gallery.identities == trial.query.identities[query]
    counts = np.flatnonzero((gallery.identities != JUNK) & ~(same & (gallery.cameras == trial.query.cameras[query])))
    if len(counts) > top_k:  # what cannot be among them is not sorted
        counts = counts[distances[counts] <= np.partition(distances[counts], top_k - 1)[top_k - 1]]
    return counts[np.lexsort((same[counts], distances[counts]))[:top_k]]


def ranked_lists(trial: Trial, query_features: np.ndarray, gallery_features: np.ndarray, path: Path, *,
                 num_queries: int = 8, top_k: int = 10, seed: int = 0) -> None:
    """Draws random queries, each with its `top_k` gallery images: right ones framed in green, wrong ones in red."""
    query, gallery = trial.query, trial.gallery
    chosen = np.sort(np.random.default_rng(seed).permutation(len(query))[:num_queries])
    distances = l2_distances(query_features[chosen], gallery_features)
    cell = (_CROP[0] + 2 * _FRAME + _GAP, _CROP[1] + 2 * _FRAME + _GAP)
    columns = min(top_k, len(gallery)) + 1
    sheet = Image.new("RGB", (columns * cell[0] + 3 * _GAP, len(chosen) * cell[1] + _GAP), _PAPER)
    for row, q in enumerate(chosen):
        ranked = ranked_gallery(trial, q, distances[row], top_k)
        pixels = [query.select(np.array([q])).decode(_CROP[1], _CROP[0])[0],
                  *gallery.select(ranked).decode(_CROP[1], _CROP[0])]
        colors = [_QUERY, *(_RIGHT if same else _WRONG for same in gallery.identities[ranked] == query.identities[q])]
        for column, (crop, color) in enumerate(zip(pixels, colors, strict=True)):
            left = _GAP + column * cell[0] + (2 * _GAP if column else 0)  # a wider space after the query
            top = _GAP + row * cell[1]
            ImageDraw.Draw(sheet).rectangle(
                (left, top, left + _CROP[0] + 2 * _FRAME - 1, top + _CROP[1] + 2 * _FRAME - 1), fill=color)
            sheet.paste(Image.fromarray(crop), (left + _FRAME, top + _FRAME))
    try:
        save_whole(sheet, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from error


_MIN_CELLS = 4  # in height and in width; fewer say too little of where


def make_activation_maps(model: JLML, data: ml_collections.ConfigDict
                         ) -> tuple[Callable[[Any, jax.Array], dict[str, jax.Array]], dict[str, str]]:
    """Where each tower responds, by branch: a compiled function, and the units that it looks at, such as conv5_3.

    The function takes (variables, images uint8 [B, H, W, 3]) to maps [B, towers, h, w]: `global` has one tower, `local`
    one a strip, from top to bottom. A map is the mean over channels of a unit's squared activations, scaled so that the
    strongest cell of each tower and image is 1. The unit is the tower's last, before the average pool; where the input
    is so small that little is left of its map there, the last of the deepest stage that has 4 x 4 cells.
    """
    towers = {"global": ["global_tower"], "local": [f"local_tower_{j}" for j in range(model.num_strips)]}
    towers = {branch: towers[branch] for branch in model.active_branches()}

    def energies(variables, images):
        _, state = model.apply(variables, normalise(images, data), train=False, mutable=["intermediates"])
        captured = state["intermediates"]
        return {branch: {f"{stage}_{model.depth}": jnp.stack([_energy(captured[tower][stage][0]) for tower in names], 1)
                         for stage in captured[names[0]]} for branch, names in towers.items()}

    images = jax.ShapeDtypeStruct((1, data.height, data.width, 3), jnp.uint8)
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros(images.shape)))
    shapes = jax.eval_shape(energies, variables, images)
    units = {branch: next((unit for unit in sorted(found, reverse=True) if min(found[unit].shape[2:]) >= _MIN_CELLS),
                          min(found)) for branch, found in shapes.items()}

    def maps(variables, images):
        found = energies(variables, images)
        return {branch: found[branch][unit] for branch, unit in units.items()}

    return jax.jit(maps), units


def _energy(activations: jax.Array) -> jax.Array:
    energy = jnp.square(activations.astype(jnp.float32)).mean(-1)
    return energy / jnp.maximum(energy.max((1, 2), keepdims=True), 1e-12)


# From nothing to the strongest response: red, green, blue (of matplotlib's plasma) and opacity, 0 to 255.
HEAT = ((84, 2, 163, 0), (139, 10, 165, 60), (204, 71, 120, 130), (243, 135, 72, 180), (249, 220, 36, 215))
_LEVELS = 32


def heat_layer(maps: np.ndarray, height: int, width: int) -> Image.Image:
    """Activation maps of one image as a transparent layer over it; upsampled bilinearly, palette colours.

    maps [towers, h, w], 0 to 1, are laid from top to bottom, each over its share of the height (rounded up).
    """
    rows = math.ceil(height / len(maps))
    scaled = [np.asarray(Image.fromarray(np.float32(one)).resize((width, rows), Image.Resampling.BILINEAR))
              for one in maps]
    levels = np.rint(np.concatenate(scaled).clip(0, 1) * (_LEVELS - 1)).astype(np.uint8)
    layer = Image.fromarray(levels, "P")
    positions = np.linspace(0, len(HEAT) - 1, _LEVELS)
    palette = np.stack([np.interp(positions, np.arange(len(HEAT)), channel) for channel in np.transpose(HEAT)], 1)
    layer.putpalette(np.rint(palette).astype(np.uint8).tobytes(), "RGBA")
    return layer


@dataclasses.dataclass(frozen=True, eq=False)
class Curve:
    """One line of a chart, or one outline of a histogram."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    color: int = 0  # of COLORS
    dashed: bool = False


# Told apart by the colour-blind, and at least 4.5 : 1 on white. A page may override them by the classes c0, c1, ...
COLORS = ("#1d5fb4", "#b3470f", "#0b7461", "#5b5f66")
_WIDTH, _HEIGHT, _RIGHT_MARGIN, _TOP, _BOTTOM = 440, 280, 14, 12, 42  # pixels of a chart and its margins
_TEXT, _CHARACTER = 12, 6.6  # pixels: size of text, mean width of a character
_LEGEND, _LINE = 34.0, 17  # pixels: left end of the legend, height of its lines


def chart(curves: Sequence[Curve], *, title: str, x_label: str, y_label: str, filled: bool = False,
          marks: Sequence[tuple[float, str]] = ()) -> str:
    """Curves as an SVG element, to be set in HTML; axes and text take the text's colour.

    `filled` shades what is under them. `marks` are vertical lines at x with labels. The y axis starts at 0, or below
    where values do. Values that are not finite are left out. The whole is one image to a screen reader, named by
    `title`, what the axes are, and the first and last values.
    """
    points = [[(x, y) for x, y in zip(curve.x, curve.y, strict=True) if math.isfinite(x) and math.isfinite(y)]
              for curve in curves]
    xs = [x for line in points for x, _ in line] + [x for x, _ in marks] or [0]
    ys = [y for line in points for _, y in line] + [0]
    left, right = min(xs), max(xs)
    x_ticks, y_ticks = _ticks(left, right), _ticks(min(ys), max(ys), beyond=True)
    bottom, top = y_ticks[0], y_ticks[-1]
    legend = _legend_rows([curve.name for curve in curves])
    first = _TOP + _LINE * (1 + max(row for row, _ in legend)) + 4 + 12 * min(2, len(marks))
    margin = 30 + _CHARACTER * max(len(_number(tick, y_ticks)) for tick in y_ticks)
    across = _WIDTH - margin - _RIGHT_MARGIN

    def place(x: float, y: float) -> tuple[float, float]:
        return (margin + across * (x - left) / ((right - left) or 1),
                _HEIGHT - _BOTTOM - (_HEIGHT - _BOTTOM - first) * (y - bottom) / ((top - bottom) or 1))

    ends = "; ".join(f"{curve.name}: {line[0][1]:.4g} at {line[0][0]:.4g}, {line[-1][1]:.4g} at {line[-1][0]:.4g}"
                     for curve, line in zip(curves, points, strict=True) if line)
    svg = ElementTree.Element("svg", {
        "xmlns": "http://www.w3.org/2000/svg", "viewBox": f"0 0 {_WIDTH} {_HEIGHT}", "role": "img", "class": "chart",
        "aria-label": f"{title}: {y_label} by {x_label}. {ends}.", "font-size": str(_TEXT),
        "font-family": "system-ui, sans-serif", "fill": "currentColor"})

    def text(x: float, y: float, content: str, anchor: str, **attributes: str) -> None:
        ElementTree.SubElement(svg, "text", {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor,
                                             **attributes}).text = content

    def line(start: tuple[float, float], end: tuple[float, float], **attributes: str) -> None:
        ElementTree.SubElement(svg, "path", {"d": _path([start, end]), "stroke": "currentColor", "fill": "none",
                                             **attributes})

    for tick in y_ticks:
        line(place(left, tick), place(right, tick), opacity="0.15")
        text(margin - 7, place(left, tick)[1] + 4, _number(tick, y_ticks), "end")
    for tick in x_ticks:
        x, y = place(tick, bottom)
        line((x, y), (x, y + 4), opacity="0.5")
        text(x, y + 17, _number(tick, x_ticks), "middle")
    line(place(left, bottom), place(right, bottom), opacity="0.5")
    text(margin + across / 2, _HEIGHT - 6, x_label, "middle", opacity="0.8")
    middle = (first + _HEIGHT - _BOTTOM) / 2
    text(12, middle, y_label, "middle", opacity="0.8", transform=f"rotate(-90 12 {middle:.1f})")

    for number, (x, label) in enumerate(sorted(marks)):
        end = first - 2 - 12 * (number % 2)  # so that the labels of two close ones do not collide
        line(place(x, bottom), (place(x, bottom)[0], end), **{"stroke-dasharray": "2 3", "class": "mark"})
        text(place(x, bottom)[0], end - 4, label, "middle", **{"font-size": "11"})
    for curve, line_points, (row, start) in zip(curves, points, legend, strict=True):
        color = {"class": f"c{curve.color}", "stroke": COLORS[curve.color], "fill": "none", "stroke-width": "2",
                 "stroke-linejoin": "round"} | ({"stroke-dasharray": "6 3"} if curve.dashed else {})
        placed = [place(x, y) for x, y in line_points]
        if filled and placed:
            area = [(placed[0][0], place(0, bottom)[1]), *placed, (placed[-1][0], place(0, bottom)[1])]
            ElementTree.SubElement(svg, "path", color | {
                "d": _path(area), "class": f"c{curve.color} area", "fill": COLORS[curve.color], "fill-opacity": "0.2",
                "stroke": "none"})
        ElementTree.SubElement(svg, "path", color | {"d": _path(placed)})
        if len(placed) == 1:
            ElementTree.SubElement(svg, "circle", color | {
                "cx": f"{placed[0][0]:.1f}", "cy": f"{placed[0][1]:.1f}", "r": "2"})
        baseline = _TOP + _LINE * row
        ElementTree.SubElement(svg, "path", color | {"d": _path([(start, baseline), (start + 18, baseline)])})
        text(start + 24, baseline + 4, curve.name, "start")
    return ElementTree.tostring(svg, encoding="unicode")


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) if points else ""


def _legend_rows(names: Sequence[str]) -> list[tuple[int, float]]:
    """The row and the left end of each name in the legend."""
    places, row, left = [], 0, _LEGEND
    for name in names:
        width = 24 + _CHARACTER * len(name) + 14
        if left > _LEGEND and left + width > _WIDTH:
            row, left = row + 1, _LEGEND
        places.append((row, left))
        left += width
    return places


def _ticks(low: float, high: float, beyond: bool = False) -> list[float]:
    """About five multiples of 1, 2 or 5 times a power of ten in [low, high]; `beyond` goes on to enclose it."""
    if not high > low:
        return [low, low + 1] if beyond else [low]
    power = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = power * next(factor for factor in (5, 2, 1) if (high - low) / (power * factor) >= 3.999)
    first, last = (math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)) if beyond else (
        math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9))
    return [step * k for k in range(first, last + 1)]


def _number(tick: float, ticks: Sequence[float]) -> str:
    step = ticks[1] - ticks[0] if len(ticks) > 1 else 1
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{tick:,.{decimals}f}" if abs(tick) >= 1e-12 else "0"
