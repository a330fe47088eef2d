"""The running diagram of the book: one layer, from left to right, a shape on every arrow.

What is frozen has a grey, dashed outline; what is trained a coloured, solid one.
"""

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Polygon

from rlora_lab.plotting import OKABE_ITO

FROZEN = {"facecolor": "#F2F2F2", "edgecolor": "#555555", "linestyle": "--"}
TRAINED = {"facecolor": "#E3F0F8", "edgecolor": OKABE_ITO["blue"], "linestyle": "-"}
RANDOM = {"facecolor": "#FDF3DC", "edgecolor": OKABE_ITO["orange"], "linestyle": "-"}
ROUTER = {"facecolor": "#DFF3EC", "edgecolor": OKABE_ITO["green"], "linestyle": "-"}
GREY = "#333333"


def _canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty drawing, one unit of the axes to 0.9 inch."""
    figure, axes = plt.subplots(figsize=(0.9 * width, 0.9 * height))
    axes.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    axes.axis("off")
    return figure, axes


def _box(axes: Axes, x: float, y: float, text: str, look: dict, left=0.5, right=0.5, width=0.9):
    """A box around (x, y) of half-heights `left` and `right`: the lower end has fewer numbers."""
    half = width / 2
    corners = [(x - half, y - left), (x - half, y + left), (x + half, y + right)]
    axes.add_patch(Polygon([*corners, (x + half, y - right)], linewidth=1.4, **look))
    axes.text(x, y, text, ha="center", va="center", fontsize=10)


def _circle(axes: Axes, x: float, y: float, text: str) -> None:
    axes.add_patch(Circle((x, y), 0.19, facecolor="white", edgecolor=GREY, linewidth=1.2))
    axes.text(x, y, text, ha="center", va="center", fontsize=10)


def _arrow(axes: Axes, *points: tuple[float, float], text: str = "", at: int = 0) -> None:
    """A path through the points; the text stands over its `at`-th piece."""
    xs, ys = zip(*points, strict=True)
    axes.plot(xs[:-1], ys[:-1], color=GREY, linewidth=1.1, linestyle="-", marker="")
    style = {"arrowstyle": "-|>", "color": GREY, "linewidth": 1.1, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", xy=points[-1], xytext=points[-2], arrowprops=style)
    if text:
        (x0, y0), (x1, y1) = points[at : at + 2]
        axes.text((x0 + x1) / 2, max(y0, y1) + 0.08, text, ha="center", va="bottom", fontsize=8)


def _note(axes: Axes, x: float, y: float, text: str, look: dict) -> None:
    axes.text(x, y, text, ha="center", va="center", fontsize=8, color=look["edgecolor"])


def _frozen_way(axes: Axes, y: float, box: float, half: float, plus: float) -> None:
    """The upper way of every layer: x through W0, at `box`, to the sum at `plus`, which is h."""
    end = axes.get_xlim()[1]
    axes.text(0.15, y, "$x$", ha="center", va="center", fontsize=11)
    _arrow(axes, (0.32, y), (box - 0.65, y), text="$(\\ldots, d_\\mathrm{in})$")
    _box(axes, box, y, "$W_0$", FROZEN, half, half, 1.3)
    _note(axes, box + 1.05, y + half - 0.08, "frozen", FROZEN)
    _arrow(axes, (box + 0.65, y), (plus - 0.19, y), text="$(\\ldots, d_\\mathrm{out})$")
    _circle(axes, plus, y, "+")
    _arrow(axes, (plus + 0.19, y), (end - 0.3, y))
    axes.text(end - 0.15, y, "$h$", ha="center", va="center", fontsize=11)


def lora_layer() -> Figure:
    """LoRA: x goes through the frozen W0, and through A and B, whose product is scaled by s."""
    figure, axes = _canvas(8.0, 3.0)
    top, low = 2.3, 0.75
    _frozen_way(axes, top, box=4.0, half=0.5, plus=6.9)

    _arrow(axes, (0.7, top), (0.7, low), (1.0, low))
    _box(axes, 1.45, low, "Drop", RANDOM, 0.3, 0.3)
    _arrow(axes, (1.9, low), (2.7, low), text="$(\\ldots, d_\\mathrm{in})$")
    _box(axes, 3.15, low, "$A$", TRAINED, 0.55, 0.2)
    _arrow(axes, (3.6, low), (4.4, low), text="$(\\ldots, r)$")
    _box(axes, 4.85, low, "$B$", TRAINED, 0.2, 0.55)
    _note(axes, 4.0, low - 0.6, "trained", TRAINED)
    _arrow(axes, (5.3, low), (6.1, low), text="$(\\ldots, d_\\mathrm{out})$")
    _circle(axes, 6.29, low, "$s$")
    _arrow(axes, (6.48, low), (6.9, low), (6.9, top - 0.19))
    return figure


def rlora_layer() -> Figure:
    """R-LoRA with three heads: one A, a mask and a B to each head, a router, and the side pair."""
    figure, axes = _canvas(9.0, 5.3)
    top, middle, router, side = 4.7, 2.9, 1.3, 0.4
    _frozen_way(axes, top, box=4.25, half=0.4, plus=8.1)

    _arrow(axes, (0.7, top), (0.7, middle), (1.3, middle))
    _box(axes, 1.75, middle, "$A$", TRAINED, 0.5, 0.2)
    _arrow(axes, (2.2, middle), (3.3, middle), text="$(\\ldots, r)$")
    for head, y in enumerate((middle + 0.75, middle, middle - 0.75), 1):
        if y != middle:
            _arrow(axes, (3.0, middle), (3.0, y), (3.3, y))
        _box(axes, 3.75, y, f"Drop$_{head}$", RANDOM, 0.22, 0.22)
        _arrow(axes, (4.2, y), (4.7, y))
        _box(axes, 5.1, y, f"$B_{head}$", TRAINED, 0.14, 0.32, 0.8)
        _arrow(axes, (5.5, y), (5.91, y))
        end = (6.81, y) if y == middle else (7.0, middle + (0.19 if y > middle else -0.19))
        _arrow(axes, (6.29, y), *([(7.0, y)] if y != middle else []), end)
    _note(axes, 1.75, middle - 0.62, "trained", TRAINED)

    _arrow(axes, (0.7, middle), (0.7, router), (1.3, router))
    _box(axes, 1.75, router, "$W_r$", ROUTER, 0.35, 0.2)
    _arrow(axes, (2.2, router), (3.3, router), text="$(\\ldots, N)$")
    _box(axes, 3.75, router, "softmax", ROUTER, 0.22, 0.22)
    _arrow(axes, (4.2, router), (6.1, router), (6.1, middle - 0.94), text="$g\\;(\\ldots, N)$")
    for head, y in enumerate((middle + 0.75, middle, middle - 0.75), 1):
        if y > middle - 0.75:
            _arrow(axes, (6.1, y - 0.56), (6.1, y - 0.19))
        _circle(axes, 6.1, y, f"$g_{head}$")

    _arrow(axes, (0.7, router), (0.7, side), (1.3, side))
    _box(axes, 1.75, side, "$A_0$", FROZEN, 0.35, 0.16)
    _arrow(axes, (2.2, side), (4.7, side), text="$(\\ldots, r)$")
    _box(axes, 5.1, side, "$\\bar B_0$", FROZEN, 0.16, 0.35, 0.8)
    _arrow(axes, (5.5, side), (7.35, side), (7.35, middle - 0.4), (7.14, middle - 0.14))
    axes.text(7.45, middle - 0.5, "−", ha="left", va="center", fontsize=11)
    _circle(axes, 7.0, middle, "+")
    _arrow(axes, (7.19, middle), (7.91, middle))
    _circle(axes, 8.1, middle, "$s$")
    _arrow(axes, (8.1, middle + 0.19), (8.1, top - 0.19), text="")
    axes.text(8.17, 3.8, "$(\\ldots, d_\\mathrm{out})$", ha="left", va="center", fontsize=8)
    return figure
