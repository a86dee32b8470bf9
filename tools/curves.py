"""Curves drawn with Pillow: axes, lines, reference lines, a legend; for tools/charts.py."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from PIL import Image, ImageDraw, ImageFont

COLOURS = [(0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0),
           (86, 180, 233), (90, 90, 90)]        # told apart by colour-blind readers (Okabe & Ito)
BLACK, GREY, LIGHT = (0, 0, 0), (110, 110, 110), (225, 225, 225)
FINE = 3                        # drawn so many times larger, then reduced: smooth lines
LEFT, TOP, RIGHT, BOTTOM = 58, 34, 20, 54       # margins of a panel in pixels


@dataclass
class Axis:
    """low and high: the values at its ends. scale: a function that makes it linear. ticks: value ->
    label, of one line or two."""

    title: str
    low: float
    high: float
    ticks: dict[float, str]
    scale: Callable[[float], float] = float

    def at(self, value: float) -> float:
        """Where a value lies, 0 at the low end and 1 at the high one."""
        low, high = self.scale(self.low), self.scale(self.high)
        return (self.scale(value) - low) / (high - low)


def linear(title: str, low: float, high: float, count: int = 6) -> Axis:
    """An axis from about low to high with at most about `count` ticks at round numbers."""
    raw = (high - low) / count
    step = min((m * 10 ** math.floor(math.log10(raw)) for m in (1, 2, 5, 10)),
               key=lambda s: (s < raw * 0.999, s))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = {k * step: f"{k * step:.10g}" for k in range(first, last + 1)}
    return Axis(title, first * step, last * step, ticks)


def logarithmic(title: str, low: float, high: float) -> Axis:
    """A logarithmic axis of which the ends are the next 1, 2 or 5 times a power of ten."""
    round_numbers = [m * 10.0**k for k in range(-9, 10) for m in (1, 2, 5)]
    inside = [v for v in round_numbers if low * 1.001 < v < high * 0.999]
    low = max(v for v in round_numbers if v <= low * 1.001)
    high = min(v for v in round_numbers if v >= high * 0.999 and v > low)
    return Axis(title, low, high, {v: f"{v:g}" for v in (low, *inside, high)}, math.log)


@dataclass
class Curve:
    """points (x, y) in the order in which they are joined; marks: a dot at each, with its label."""

    points: list[tuple[float, float]]
    colour: tuple
    width: float = 2
    marks: list[str] | None = None


@dataclass
class Panel:
    """lines: a reference line at each value, (axis "x" or "y", value, label)."""

    title: str
    x: Axis
    y: Axis                         # its title is part of the panel's
    curves: list[Curve] = field(default_factory=list)
    lines: list[tuple[str, float, str]] = field(default_factory=list)


def draw(panels: list[Panel], legend: list[tuple[str, tuple]], width: int = 460, height: int = 360
         ) -> Image.Image:
    """Panels side by side, each width x height pixels, above the legend: (name, colour)."""
    rows = _legend_rows(legend, width * len(panels) - 2 * LEFT)
    size = width * len(panels), height + 22 * len(rows)
    page = Image.new("RGB", (size[0] * FINE, size[1] * FINE), "white")
    pen = ImageDraw.Draw(page)
    for i, panel in enumerate(panels):
        _draw_panel(pen, panel, (i * width + LEFT, TOP, (i + 1) * width - RIGHT, height - BOTTOM))
    for r, row in enumerate(rows):
        left, y = LEFT, height + 22 * r + 8
        for name, colour in row:
            pen.line(_fine(left, y, left + 22, y), colour, 3 * FINE)
            _write(pen, left + 28, y, name, "lm")
            left += 28 + _length(name) + 24
    return page.reduce(FINE)


def _draw_panel(pen: ImageDraw.ImageDraw, panel: Panel, box: tuple) -> None:
    left, top, right, bottom = box

    def at(x: float, y: float) -> tuple[float, float]:
        def kept(share: float) -> float:            # far outside, lines would be drawn over all
            return min(max(share, -0.005), 1.005)
        return (left + kept(panel.x.at(x)) * (right - left),
                bottom - kept(panel.y.at(y)) * (bottom - top))

    _write(pen, left, top - 18, panel.title, "lm", 14)
    for value, label in panel.x.ticks.items():
        x, _ = at(value, panel.y.low)
        pen.line(_fine(x, top, x, bottom), LIGHT, FINE)
        _write(pen, x, bottom + 6, label, "ma")
    for value, label in panel.y.ticks.items():
        _, y = at(panel.x.low, value)
        pen.line(_fine(left, y, right, y), LIGHT, FINE)
        _write(pen, left - 6, y, label, "rm")
    below = 28 + 14 * any("\n" in label for label in panel.x.ticks.values())
    _write(pen, (left + right) / 2, bottom + below, panel.x.title, "mm")
    for axis, value, label in panel.lines:
        (x, y), across = at(value, value), axis == "y"
        for start in range(int(left if across else top), int(right if across else bottom), 7):
            end = min(start + 4, right if across else bottom)
            pen.line(_fine(*((start, y, end, y) if across else (x, start, x, end))), BLACK, FINE)
        _write(pen, *((right - 4, y - 8) if across else (x - 4, top + 8)), label, "rm", 11)
    taken: list[tuple] = []                         # by labels of marks
    for curve in panel.curves:
        places = [at(*point) for point in curve.points]
        pen.line([v * FINE for place in places for v in place], curve.colour,
                 round(curve.width * FINE), joint="curve")
        for (x, y), label in zip(places, curve.marks or [], strict=False):
            pen.ellipse(_fine(x - 3, y - 3, x + 3, y + 3), curve.colour)
            wide = _length(label, 11)               # where there is room, else nowhere
            for x0, y0 in ((x + 5, y - 15), (x + 5, y + 3), (x - 5 - wide, y - 15),
                           (x - 5 - wide, y + 3)):
                if left < x0 and x0 + wide < right and not any(
                        x0 < a + w and a < x0 + wide and abs(y0 - b) < 11 for a, b, w in taken):
                    taken.append((x0, y0, wide))
                    _write(pen, x0, y0, label, "la", 11, curve.colour)
                    break
    pen.rectangle(_fine(*box), outline=GREY, width=FINE)


def _legend_rows(legend: list[tuple[str, tuple]], room: float) -> list[list[tuple[str, tuple]]]:
    rows: list[list] = [[]]
    for entry in legend:
        if rows[-1] and sum(52 + _length(n) for n, _ in (*rows[-1], entry)) > room:
            rows.append([])
        rows[-1].append(entry)
    return rows


def _fine(*numbers: float) -> tuple:
    return tuple(n * FINE for n in numbers)


def _length(text: str, size: int = 12) -> float:
    return ImageFont.load_default(size * FINE).getlength(text) / FINE


def _write(pen: ImageDraw.ImageDraw, x: float, y: float, text: str, anchor: str, size: int = 12,
           colour: tuple = BLACK) -> None:
    style = dict(fill=colour, font=ImageFont.load_default(size * FINE), align="center")
    if "\n" in text:                                # Pillow anchors several lines less freely
        for i, line in enumerate(text.split("\n")):
            pen.text(_fine(x, y + i * (size + 2)), line, anchor=anchor, **style)
    else:
        pen.text(_fine(x, y), text, anchor=anchor, **style)
