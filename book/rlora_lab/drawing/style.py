"""The look of the book's pictures: white ground, Okabe-Ito colours, a second channel to each."""

import matplotlib.pyplot as plt
from cycler import cycler

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


def use_book_style() -> None:
    """Set matplotlib up for the book: the n-th line has its colour, its style and its marker."""
    plt.rcdefaults()
    plt.rcParams.update(
        {
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
        }
    )


def _method(label: str, color: str, marker: str, linestyle: object) -> dict:
    return {"label": label, "color": OKABE_ITO[color], "marker": marker, "linestyle": linestyle}


# One look for each method in every chapter: `ax.plot(x, y, **METHOD_STYLES["rlora"])`.
METHOD_STYLES = {
    "lora": _method("LoRA", "black", "o", "-"),
    "lora-classic": _method("LoRA, α/r", "black", "<", "--"),
    "lora-rank": _method("LoRA, equal rank", "black", "*", ":"),
    "hydralora": _method("HydraLoRA", "orange", "s", "--"),
    "hydralora-own": _method("HydraLoRA, its own form", "orange", "p", ":"),
    "hydralora+dropout": _method("HydraLoRA + head dropout", "sky", "^", "-."),
    "hydralora+init": _method("HydraLoRA + random heads", "green", "v", ":"),
    "one-head": _method("one random head", "blue", "h", "-."),
    "mlora": _method("M-LoRA", "purple", "D", (0, (5, 1, 1, 1, 1, 1))),
    "mlora-nodropout": _method("M-LoRA, no dropout", "purple", "d", ":"),
    "rlora-centered": _method("R-LoRA, centred heads", "vermillion", "X", "--"),
    "rlora": _method("R-LoRA", "vermillion", "P", "-"),
}
