"""Pictures of recorded runs: matplotlib Figures, in the style that is set.

| picture | what |
| --- | --- |
| `overview_plot` | R-LoRA less LoRA in every comparison |
| `forest` | contrasts with their intervals |
| `task_dots` | each seed's score on each task |
| `similarity_plot` | head similarity against accuracy, a point for each run |
| `rate_curves` | validation score against learning rate |
| `related_plot` | what a method gains where tasks are related, and where they differ |

That of chapter 10 is in `rlora_lab.report.published`.
"""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..drawing.style import METHOD_STYLES, OKABE_ITO
from .loading import score_array
from .overview import LANGUAGE, Line
from .questions import Contrast, rate_means, similarity_points
from .tables import label

MAIN = ("rlora", "lora", "one-head", "mlora", "hydralora")  # all twelve would hide one another


def _style(method: str, **changes) -> dict:
    return METHOD_STYLES[method] | changes


def _ends(ax: Axes, left: str, right: str) -> None:
    """Zero as a line, and at the ends of a signed axis what lies there; a real minus."""
    ax.axvline(0, color="black", linewidth=1, linestyle="-", marker="")
    for x, words, side in ((0, f"← {left}", "left"), (1, f"{right} →", "right")):
        ax.text(x, 1.01, words, transform=ax.transAxes, ha=side, va="bottom", fontsize=9)
    ax.grid(axis="y", visible=False)


def overview_plot(lines: Sequence[Line]) -> Figure:
    """R-LoRA less LoRA of equal size: hollow where the verdict is "cannot tell", grey where it is
    "equivalent", else filled."""
    figure, ax = plt.subplots(figsize=(6.4, 1.1 + 0.25 * len(lines)))
    _ends(ax, "LoRA better", "R-LoRA better")
    fill = {"cannot tell": "white", "equivalent": "#BBBBBB"}
    for y, line in enumerate(lines):
        color = OKABE_ITO["vermillion" if line.block in LANGUAGE else "blue"]
        ax.errorbar(
            line.mean,
            y,
            xerr=[[line.mean - line.low], [line.high - line.mean]],
            color=color,
            marker="D" if line.block in LANGUAGE else "o",
            linestyle="-",
            markersize=6,
            markerfacecolor=fill.get(line.verdict, color),
            capsize=3,
        )
    ax.set_yticks(range(len(lines)), [f"{line.what} ({line.seeds} seeds)" for line in lines])
    ax.set_ylim(len(lines) - 0.5, -0.5)
    ax.set_xlabel("R-LoRA less LoRA of equal size, percentage points, 95 % interval")
    return figure


def forest(
    contrasts: Sequence[Contrast], title: str = "", left: str = "worse", right: str = "better"
) -> Figure:
    """Contrasts as points with their 95 % intervals; filled where Holm's correction leaves them
    standing. A true difference within the grey band would mostly go unseen with these seeds.
    `left` and `right` say what lies at the ends of the axis."""
    tall = any(": " in c.name for c in contrasts)  # two lines of text to each
    size = 6.4, 0.9 + (0.38 if tall else 0.3) * len(contrasts)
    figure, ax = plt.subplots(figsize=size, dpi=100 if tall else None)  # tall ones weigh most
    limits = np.array([c.detectable for c in contrasts])
    ax.barh(range(len(contrasts)), 2 * limits, 0.7, -limits, color="#E4E4E4", zorder=0)
    _ends(ax, left, right)
    for y, c in enumerate(contrasts):
        style = METHOD_STYLES.get(c.name, {"color": OKABE_ITO["black"], "marker": "o"})
        ax.errorbar(
            c.mean,
            y,
            xerr=[[c.mean - c.low], [c.high - c.mean]],
            color=style["color"],
            marker=style["marker"],
            linestyle="-",
            markersize=6,
            markerfacecolor="white" if c.verdict == "cannot tell" else style["color"],
            capsize=3,
        )
    names = [label(c.name).replace(": ", "\n") for c in contrasts]
    ax.set_yticks(range(len(contrasts)), names, fontsize=9 if tall else None)
    ax.set(xlabel="percentage points, 95 % interval")
    ax.set_title(title, pad=18)
    ax.set_ylim(len(contrasts) - 0.5, -0.5)
    return figure


def task_dots(
    result: dict, methods: Sequence[str] | None = None, metric: str | None = None
) -> Figure:
    """Each seed's test score on each task, small, and the mean over seeds, large, by method."""
    methods = [m for m in methods or result["methods"] if m in result["methods"]]
    tasks = result["tasks"]
    figure, ax = plt.subplots(figsize=(6.4, 0.8 + len(tasks) * (0.12 * len(methods) + 0.14)))
    for i, method in enumerate(methods):
        scores = 100 * score_array(result, method, metric)
        y = np.arange(len(tasks)) + 0.8 * ((i + 0.5) / len(methods) - 0.5)
        style = _style(method, linestyle="")
        where = np.broadcast_to(y, scores.shape)
        look = style | {"label": None, "alpha": 0.35, "markersize": 2.5, "markeredgewidth": 0}
        ax.plot(scores.ravel(), where.ravel(), **look)
        ax.plot(scores.mean(0), y, **style | {"markersize": 5.5})
    ax.set_yticks(range(len(tasks)), tasks)
    ax.set_ylim(len(tasks) - 0.5, -0.5)
    ax.set(xlabel=f"{metric or result['metrics'][0]} on test data, per cent")
    ax.set_title(f"Large: mean of {len(result['seeds'])} seeds; small: each seed")
    figure.legend(loc="outside right upper", fontsize=9)
    return figure


def similarity_plot(result: dict, kind: str = "change") -> Figure:
    """Cosine of the heads against the test score: small for each run, large for a method's mean."""
    points = similarity_points(result, kind)
    figure, ax = plt.subplots(figsize=(6.4, 3.4))
    for method in dict.fromkeys(m for m, _, _ in points):
        x, y = np.array([(a, 100 * b) for m, a, b in points if m == method]).T
        style = _style(method, linestyle="")
        ax.plot(x, y, **style | {"label": None, "alpha": 0.45, "markersize": 3.5})
        ax.plot(x.mean(), y.mean(), **style | {"markersize": 9, "markeredgecolor": "black"})
    what = "what training added to the heads" if kind == "change" else "the trained heads"
    ax.set(xlabel=f"mean cosine of {what}", ylabel=f"{result['metrics'][0]}, per cent")
    ax.set_title("Small: a run; large: a method's mean")
    figure.legend(loc="outside right upper", fontsize=9)
    return figure


def rate_curves(result: dict, methods: Sequence[str] | None = None) -> Figure:
    """Validation score against learning rate, mean over sweep seeds; a ring marks the chosen."""
    figure, ax = plt.subplots(figsize=(6.4, 3.6))
    every = set()
    for method in methods or result["methods"]:
        means = {rate: np.mean(values) for rate, values in rate_means(result, method).items()}
        every |= means.keys()
        ax.plot(means.keys(), means.values(), **_style(method))
        best = result["chosen"][method]
        ring = {"marker": "o", "markersize": 12, "markerfacecolor": "none", "linestyle": ""}
        ax.plot(best, means[best], **ring, color=METHOD_STYLES[method]["color"])
    ax.set(xscale="log", xlabel="learning rate")
    ax.set_ylabel(f"{result['metrics'][0]} on validation data, per cent")
    ax.set_xticks(sorted(every), [f"{rate:g}" for rate in sorted(every)], rotation=45)
    ax.minorticks_off()
    ax.set_title(f"Mean of sweep seeds ({len(result['sweep_seeds'])}); rings: chosen")
    figure.legend(loc="outside right upper", fontsize=9)
    return figure


def related_plot(found: dict[str, list[Contrast]], against: str = "lora") -> Figure:
    """What methods gain over another on related and on different tasks: see `relatedness`."""
    figure, ax = plt.subplots(figsize=(6.4, 0.9 + 0.34 * len(found["related"])))
    looks = {
        "different": {"color": OKABE_ITO["vermillion"], "marker": "P", "linestyle": "-"},
        "related": {"color": OKABE_ITO["blue"], "marker": "o", "linestyle": "-"},
    }
    _ends(ax, f"{label(against)} better", "the method better")
    for shift, (kind, look) in zip((-0.14, 0.14), looks.items(), strict=True):
        for y, c in enumerate(found[kind]):
            ax.errorbar(
                c.mean,
                y + shift,
                xerr=[[c.mean - c.low], [c.high - c.mean]],
                capsize=3,
                label=f"{kind} tasks" if y == 0 else None,
                **look,
            )
    names = [label(c.name) for c in found["related"]]
    ax.set_yticks(range(len(names)), names)
    ax.set(xlabel=f"percentage points less {label(against)}, 95 % interval")
    ax.set_ylim(len(names) - 0.5, -0.5)
    figure.legend(loc="outside upper center", ncols=2)
    return figure
