"""The look of the book's pictures: white ground, Okabe-Ito colours, a second channel to each."""

from contextlib import AbstractContextManager, ExitStack

import matplotlib.pyplot as plt
from cycler import cycler
from IPython import get_ipython
from matplotlib.axes import Axes

# Okabe and Ito's colours, told apart by readers with any colour vision, in this order.
OKABE_ITO = {
    "blue": "#0072B2",
    "vermillion": "#D55E00",
    "green": "#009E73",
    "purple": "#CC79A7",
    "orange": "#E69F00",
    "sky": "#56B4E9",
    "black": "#000000",
}
LINE_STYLES = ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2))]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]


STYLE = {
    # The n-th line has its colour, its style and its marker.
    "axes.prop_cycle": cycler(color=list(OKABE_ITO.values()))
    + cycler(linestyle=LINE_STYLES)
    + cycler(marker=MARKERS),
    "axes.facecolor": "white",
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "figure.dpi": 144,
    "figure.facecolor": "white",
    "figure.figsize": (6.4, 3.2),
    "font.size": 9,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "mathtext.fontset": "cm",
    "savefig.facecolor": "white",
    "svg.hashsalt": "rlora",  # the same text each time that a picture is drawn
}


def book_style() -> AbstractContextManager:
    """The look of what is drawn and saved inside: `with book_style(): ...`, or `@book_style()`.

    Outside, matplotlib's settings are as they were; inside, nothing of them is left.
    """
    return plt.style.context(STYLE, after_reset=True)


_cell = ExitStack()


def _enter(info: object) -> None:
    _cell.enter_context(book_style())


def _leave(result: object) -> None:
    _cell.close()


def use_book_style() -> None:
    """In a notebook: from the next cell on, each cell and the pictures it shows are in the style.

    Raises:
        RuntimeError: this is no notebook.
    """
    shell = get_ipython()
    if shell is None:
        raise RuntimeError("use_book_style is for notebooks; elsewhere: with book_style()")
    shell.enable_matplotlib("inline")  # now, for what it sets has to outlive the next cell
    shell.events.register("pre_run_cell", _enter)
    shell.events.register("post_run_cell", _leave)  # pictures were shown before, at post_execute


def panels(count: int, height: float = 2.9) -> list[Axes]:
    """The axes of `count` pictures of their own, each `height` inches high.

    A cell that is tagged `panels` shows them side by side, and below one another on a phone. Three
    stand in a row where `count` is a multiple of three, else two: in either width the type keeps
    its size on the page.
    """
    width = 3.4 if count % 3 else 2.2
    return [plt.subplots(figsize=(width, height))[1] for _ in range(count)]


def _method(label: str, color: str, marker: str, linestyle: object) -> dict:
    return {"label": label, "color": OKABE_ITO[color], "marker": marker, "linestyle": linestyle}


# One look for each method in every chapter: `ax.plot(x, y, **METHOD_STYLES["rlora"])`.
METHOD_STYLES = {
    "lora": _method("LoRA", "black", "o", "-"),
    "lora-classic": _method("LoRA, α/r", "black", "<", "--"),
    "lora-rank": _method("LoRA, equal rank", "black", "*", ":"),
    "lora-rank+init": _method("LoRA, equal rank, random start", "black", "x", "-."),
    "none": _method("no adapter", "black", ".", ":"),
    "heads": _method("frozen encoder, heads alone", "black", ".", ":"),
    "hydralora": _method("HydraLoRA", "orange", "s", "--"),
    "hydralora-classic": _method("HydraLoRA, α/r", "orange", "8", "-."),
    "hydralora-own": _method("HydraLoRA, its own form", "orange", "p", ":"),
    "hydralora+dropout": _method("HydraLoRA + head dropout", "sky", "^", "-."),
    "hydralora+init": _method("HydraLoRA + random heads", "green", "v", ":"),
    "one-head": _method("one random head", "blue", "h", "-."),
    "mlora": _method("M-LoRA", "purple", "D", (0, (5, 1, 1, 1, 1, 1))),
    "mlora-nodropout": _method("M-LoRA, no dropout", "purple", "d", ":"),
    "oracle": _method("a head a task, told", "green", "*", "-"),
    "rlora-centered": _method("R-LoRA, centred heads", "vermillion", "X", "--"),
    "rlora+router": _method("R-LoRA, random router", "vermillion", ">", "-."),
    "rlora-moved": _method("R-LoRA, no subtraction", "vermillion", "<", ":"),
    "rlora": _method("R-LoRA", "vermillion", "P", "-"),
}
