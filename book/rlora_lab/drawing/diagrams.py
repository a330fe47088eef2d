"""The running diagram of the book: one layer, from left to right, a shape on every arrow.

It grows from chapter to chapter. What is frozen has a grey, dashed outline; what is trained a
coloured, solid one. Each function draws one stage, as SVG on a white ground.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from io import StringIO

from IPython.display import SVG
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Polygon
from matplotlib.text import Annotation

from .style import OKABE_ITO, book_style

FROZEN = {"facecolor": "#F2F2F2", "edgecolor": "#555555", "linestyle": "--"}
TRAINED = {"facecolor": "#E3F0F8", "edgecolor": OKABE_ITO["blue"], "linestyle": "-"}
RANDOM = {"facecolor": "#FDF3DC", "edgecolor": OKABE_ITO["orange"], "linestyle": "-"}
ROUTER = {"facecolor": "#DFF3EC", "edgecolor": OKABE_ITO["green"], "linestyle": "-"}
GREY = "#333333"
TYPE = 9.5  # points, so that the widest drawing has 9 in the width of a page
PALE = 0.25  # of what a picture shows only as the place of the part at issue
PARTS = ("base", "A", "heads", "masks", "router", "side pair")
IN_WIDE, R_WIDE, OUT_WIDE = (
    r"$(\ldots, d_\mathrm{in})$",
    r"$(\ldots, r)$",
    r"$(\ldots, d_\mathrm{out})$",
)


def _canvas(width: float, height: float, left: float = 0.0) -> tuple[Figure, Axes]:
    """An empty drawing, `left` to `width`, one unit of the axes to 0.72 inch."""
    # Not by pyplot: the notebook's own backend and its settings have no part in this.
    figure = Figure(figsize=(0.72 * (width - left), 0.72 * height), layout="none")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(left, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def _svg(figure: Figure) -> SVG:
    """The drawing as SVG, the same text each time that it is drawn."""
    text = StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return SVG(text.getvalue())


def _box(axes: Axes, x: float, y: float, text: str, look: dict, left=0.5, right=0.5, width=0.9):
    """A box around (x, y) of half-heights `left` and `right`: the lower end has fewer numbers."""
    half = width / 2
    corners = [(x - half, y - left), (x - half, y + left), (x + half, y + right)]
    axes.add_patch(Polygon([*corners, (x + half, y - right)], linewidth=1.4, **look))
    axes.text(x, y, text, ha="center", va="center", fontsize=TYPE)


def _circle(axes: Axes, x: float, y: float, text: str) -> None:
    axes.add_patch(Circle((x, y), 0.22, facecolor="white", edgecolor=GREY, linewidth=1.2))
    axes.text(x, y, text, ha="center", va="center", fontsize=TYPE)


def _arrow(axes: Axes, *points: tuple[float, float], text: str = "", at: int = 0) -> None:
    """A path through the points; the text stands over its `at`-th piece."""
    xs, ys = zip(*points, strict=True)
    axes.plot(xs[:-1], ys[:-1], color=GREY, linewidth=1.1, linestyle="-", marker="")
    style = {"arrowstyle": "-|>", "color": GREY, "linewidth": 1.1, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", xy=points[-1], xytext=points[-2], arrowprops=style)
    if text:
        (x0, y0), (x1, y1) = points[at : at + 2]
        axes.text((x0 + x1) / 2, max(y0, y1) + 0.08, text, ha="center", va="bottom", fontsize=TYPE)


def _note(axes: Axes, x: float, y: float, text: str, look: dict) -> None:
    axes.text(x, y, text, ha="center", va="center", fontsize=TYPE, color=look["edgecolor"])


@contextmanager
def _shown(axes: Axes, lit: bool) -> Iterator[None]:
    """What is drawn inside is pale unless it is lit."""
    before = set(axes.get_children())
    yield
    if not lit:
        for artist in axes.get_children():
            if artist not in before:
                artist.set_alpha(PALE)
                if isinstance(artist, Annotation):  # an arrow, which has an alpha of its own
                    artist.arrow_patch.set_alpha(PALE)


def _frozen_way(axes: Axes, y: float, box: float, half: float, plus: float) -> None:
    """The upper way of every layer: x through W0, at `box`, to the sum at `plus`, which is h."""
    end = axes.get_xlim()[1]
    axes.text(0.15, y, "$x$", ha="center", va="center", fontsize=11)
    _arrow(axes, (0.32, y), (box - 0.65, y), text=IN_WIDE)
    _box(axes, box, y, "$W_0$", FROZEN, half, half, 1.3)
    _note(axes, box + 1.05, y + half - 0.08, "frozen", FROZEN)
    _arrow(axes, (box + 0.65, y), (plus - 0.22, y), text=OUT_WIDE)
    _circle(axes, plus, y, "+")
    _arrow(axes, (plus + 0.22, y), (end - 0.3, y))
    axes.text(end - 0.15, y, "$h$", ha="center", va="center", fontsize=11)


@book_style()
def full_update() -> SVG:
    """Full fine-tuning: beside the frozen W0 a change of the same size, all of it trained."""
    figure, axes = _canvas(6.4, 3.0)
    top, low = 2.3, 0.85
    _frozen_way(axes, top, box=3.0, half=0.5, plus=5.3)
    _arrow(axes, (0.7, top), (0.7, low), (2.35, low), text=IN_WIDE, at=1)
    _box(axes, 3.0, low, r"$\Delta W$", TRAINED, 0.5, 0.5, 1.3)
    _note(axes, 3.0, low - 0.64, "trained", TRAINED)
    _arrow(axes, (3.65, low), (5.3, low), (5.3, top - 0.22), text=OUT_WIDE)
    return _svg(figure)


def _lora(axes: Axes) -> None:
    top, low = 2.3, 0.75
    _frozen_way(axes, top, box=4.0, half=0.5, plus=6.9)
    _arrow(axes, (0.7, top), (0.7, low), (1.0, low))
    _box(axes, 1.45, low, "Drop", RANDOM, 0.3, 0.3)
    _arrow(axes, (1.9, low), (2.7, low), text=IN_WIDE)
    _box(axes, 3.15, low, "$A$", TRAINED, 0.55, 0.2)
    _arrow(axes, (3.6, low), (4.4, low), text=R_WIDE)
    _box(axes, 4.85, low, "$B$", TRAINED, 0.2, 0.55)
    _note(axes, 4.0, low - 0.6, "trained", TRAINED)
    _arrow(axes, (5.3, low), (6.2, low), text=OUT_WIDE)
    _circle(axes, 6.42, low, "$s$")
    _arrow(axes, (6.64, low), (6.9, low), (6.9, top - 0.22))


@book_style()
def lora_layer() -> SVG:
    """LoRA: x goes through the frozen W0, and through A and B, whose product is scaled by s."""
    figure, axes = _canvas(8.0, 3.0)
    _lora(axes)
    return _svg(figure)


@book_style()
def lora_for_tasks() -> SVG:
    """The same layer, to which the tokens of every task come: one A and one B for all of them."""
    figure, axes = _canvas(8.0, 3.0, left=-1.8)
    _lora(axes)
    for y, text, color in (
        (2.75, "task 1", "blue"),
        (2.3, "task 2", "vermillion"),
        (1.85, "task $T$", "green"),
    ):
        axes.text(-1.7, y, text, ha="left", va="center", fontsize=TYPE, color=OKABE_ITO[color])
        _arrow(axes, (-0.85, y), (-0.02, 2.3 + (y - 2.3) / 6))
    axes.text(-1.3, 2.08, r"$\vdots$", ha="center", va="center", fontsize=TYPE)
    return _svg(figure)


@book_style()
def heads_layer(side_pair: bool = False, masks: bool = False, lit: Collection[str] = PARTS) -> SVG:
    """Three heads on one A, weighed by a router; with both options this is R-LoRA.

    Args:
        side_pair: draw the frozen pair that is subtracted, which random heads need.
        masks: draw a dropout mask to each head.
        lit: which of `PARTS` are at issue; the rest is drawn pale.

    Raises:
        ValueError: a part that there is not.
    """
    unknown = sorted(set(lit) - set(PARTS))
    if unknown:
        raise ValueError(f"no part {unknown[0]!r}: there are {', '.join(PARTS)}")
    figure, axes = _canvas(10.4, 5.4 if side_pair else 4.5)
    base, plus, gate, total = 4.4 if side_pair else 3.5, 9.4, 7.15, 8.05
    top, middle, router = base + 0.4, base - 1.4, base - 3.0
    ways = (middle + 0.8, middle, middle - 0.8)
    with _shown(axes, "base" in lit):
        _frozen_way(axes, top, box=4.9, half=0.4, plus=plus)

    with _shown(axes, "A" in lit):
        _arrow(axes, (0.7, top), (0.7, middle), (1.3, middle))
        _box(axes, 1.75, middle, "$A$", TRAINED, 0.5, 0.2)
        _note(axes, 1.75, middle - 0.62, "trained", TRAINED)
        axes.text(2.62, middle + 0.08, R_WIDE, ha="center", va="bottom", fontsize=TYPE)
        axes.plot(
            [2.2, 3.05], [middle, middle], color=GREY, linewidth=1.1, linestyle="-", marker=""
        )
    for head, y in enumerate(ways, 1):
        if masks:
            with _shown(axes, "masks" in lit):
                _arrow(axes, (3.05, middle), (3.05, y), (3.43, y))
                _box(axes, 3.9, y, f"Drop$_{head}$", RANDOM, 0.25, 0.25)
                _arrow(axes, (4.35, y), (5.2, y), text=R_WIDE)
        with _shown(axes, "heads" in lit):
            if not masks:
                _arrow(axes, (3.05, middle), (3.05, y), (5.2, y), text=R_WIDE, at=1)
            _box(axes, 5.6, y, f"$B_{head}$", TRAINED, 0.14, 0.32, 0.8)
            _arrow(axes, (6.0, y), (gate - 0.22, y), text=OUT_WIDE)
            if y == middle:
                end = [(total - 0.22, y)]
            else:
                end = [(total, y), (total, middle + (0.22 if head == 1 else -0.22))]
            _arrow(axes, (gate + 0.22, y), *end)

    with _shown(axes, "router" in lit):
        _arrow(axes, (0.7, middle), (0.7, router), (1.3, router))
        _box(axes, 1.75, router, "$W_r$", ROUTER, 0.35, 0.2)
        _arrow(axes, (2.2, router), (3.43, router), text=r"$(\ldots, N)$")
        _box(axes, 3.9, router, "softmax", ROUTER, 0.25, 0.25)
        up = (gate, router), (gate, ways[2] - 0.22)
        _arrow(axes, (4.35, router), *up, text=r"$g\;(\ldots, N)$")
        for head, y in enumerate(ways, 1):
            if head < 3:
                _arrow(axes, (gate, y - 0.58), (gate, y - 0.22))
            _circle(axes, gate, y, f"$g_{head}$")

    if side_pair:
        with _shown(axes, "side pair" in lit):
            side = router - 0.9
            _arrow(axes, (0.7, router), (0.7, side), (1.3, side))
            _box(axes, 1.75, side, "$A_0$", FROZEN, 0.35, 0.16)
            _arrow(axes, (2.2, side), (5.2, side), text=R_WIDE)
            _box(axes, 5.6, side, r"$\bar B_0$", FROZEN, 0.16, 0.35, 0.8)
            _note(axes, 3.7, side - 0.2, "frozen", FROZEN)
            bend = (total + 0.4, side), (total + 0.4, middle - 0.4), (total + 0.13, middle - 0.14)
            _arrow(axes, (6.0, side), *bend, text=OUT_WIDE)
            axes.text(total + 0.5, middle - 0.5, "−", ha="left", va="center", fontsize=12)
    with _shown(axes, "heads" in lit):
        _circle(axes, total, middle, "+")
        _arrow(axes, (total + 0.22, middle), (plus - 0.22, middle), text=OUT_WIDE)
        _circle(axes, plus, middle, "$s$")
        _arrow(axes, (plus, middle + 0.22), (plus, top - 0.22))
    return _svg(figure)
