"""The published numbers, and what one run each could show of their leads.

Average accuracies in per cent, as printed. "v1" is the first version of the R-LoRA paper,
https://arxiv.org/abs/2502.15455v1. "later" is the same group's https://arxiv.org/abs/2508.05078,
at equal numbers of trained parameters, the router counted.
"""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy import stats

from ..drawing.style import METHOD_STYLES
from .loading import score_array
from .questions import differences

ROWS = (
    "LoRA, smaller",
    "LoRA, equal size",
    "HydraLoRA",
    "+ head dropout",
    "+ random heads",
    "R-LoRA",
)
_ = float("nan")  # the table has no such row
PUBLISHED = {  # (source, what was measured): the average of each of ROWS
    ("v1, Table 5", "8 tasks, Qwen2.5-0.5B"): (_, _, 64.13, 66.22, 66.31, 67.31),
    ("v1, Table 5", "8 tasks, Qwen2.5-3B"): (_, _, 82.66, 82.84, 83.34, 84.09),
    ("v1, Table 4", "5 tasks, Qwen2.5-0.5B"): (_, _, 72.69, 73.02, 72.98, 73.59),
    # LoRA of r = 8 (0.062 %) and r = 16; that and R-LoRA are printed as 0.124 %, router left out
    ("v1, Table 2", "a single domain"): (32.82, 34.79, 37.08, _, _, 37.13),
    ("v1, Table 3", "Flan to BBH, LLaMA-2 7B"): (37.2, _, 41.8, _, _, 42.3),
    ("v1, Table 3", "Flan to BBH, LLaMA-2 13B"): (40.9, _, 44.7, _, _, 45.4),
    ("later", "8 tasks, Qwen2.5-3B"): (_, 76.48, _, _, _, 77.99),
    ("later", "8 tasks, 7B"): (_, 80.48, _, _, _, 81.74),
    ("later", "BBH, 7B"): (_, 49.51, _, _, _, 49.51),
    ("later", "BBH, 14B"): (_, 54.23, _, _, _, 54.08),
    ("later", "Flan to BBH, LLaMA-2 7B"): (_, 42.21, _, _, _, 42.24),
    ("later", "Flan to BBH, LLaMA-2 13B"): (_, 45.02, _, _, _, 44.96),
    # three models, of which we have not noted the names
    ("later", "5 tasks to BBH, first model"): (_, 48.36, _, _, _, 48.32),
    ("later", "5 tasks to BBH, second model"): (_, 44.89, _, _, _, 45.01),
    ("later", "5 tasks to BBH, third model"): (_, 52.93, _, _, _, 52.21),
}
OUTSIDE = "BBH"  # in the name of a comparison that is out of domain
PAIR = ("lora", "rlora")  # whose scatter is set against the leads
STYLES = {  # the look of each row but the last
    "LoRA, smaller": "lora-rank",
    "LoRA, equal size": "lora",
    "HydraLoRA": "hydralora",
    "+ head dropout": "hydralora+dropout",
    "+ random heads": "hydralora+init",
}
SHOWN = 2 * 2**0.5  # in sigma: what one run each has to differ by, see `scatter_table`


def published() -> pd.DataFrame:
    """The published averages, a row for each comparison; NaN where a table has no such row."""
    table = pd.DataFrame.from_dict(PUBLISHED, orient="index", columns=list(ROWS))
    table.index = [f"{what} ({source})" for source, what in PUBLISHED]
    return table


def leads() -> pd.DataFrame:
    """What R-LoRA is ahead of each other row by, in percentage points."""
    averages = published()
    return averages.drop(columns="R-LoRA").rsub(averages["R-LoRA"], axis=0)


def deviation(values: Sequence[float]) -> tuple[float, float, float]:
    """Standard deviation of at least two normal values with its 95 % interval (chi squared)."""
    free = len(values) - 1
    sigma = float(np.std(values, ddof=1))
    low, high = (float(sigma * (free / stats.chi2.ppf(q, free)) ** 0.5) for q in (0.975, 0.025))
    return sigma, low, high


def scatter(result: dict) -> dict[str, tuple[float, float, float]]:
    """How far runs lie apart that differ in their seed alone, in percentage points.

    `deviation` over seeds of a run's mean over tasks, for "lora" and "rlora", and as "paired" that
    of their difference seed by seed. `result` as `load_evidence` gives it.
    """
    found = {m: deviation(100 * score_array(result, m).mean(1)) for m in PAIR}
    return found | {"paired": deviation(differences(result, "rlora", "lora"))}


def scatter_table(records: dict[str, dict]) -> pd.DataFrame:
    """The scatter of each record `{words: result}`, and the difference that one run could show.

    Two runs of equally good methods differ by more than twice the standard deviation of their
    difference about once in twenty times: by 2 sqrt(2) sigma if their luck is independent, by twice
    that of the paired difference if they share a seed.
    """
    rows = {}
    for words, result in records.items():
        found = scatter(result)
        independent = np.hypot(*(found[m][0] for m in PAIR))
        for name, (sigma, low, high) in found.items():
            alone = name in METHOD_STYLES
            label = METHOD_STYLES[name]["label"] if alone else "their difference"
            rows[f"{words}: {label}"] = {
                "seeds": len(result["seeds"]),
                "sigma": sigma,
                "sigma from": low,
                "sigma to": high,
                "if independent": np.nan if alone else independent,
                "one run each shows": (SHOWN if alone else 2) * sigma,
            }
    return pd.DataFrame.from_dict(rows, orient="index")


def shown_table(records: dict[str, dict]) -> pd.DataFrame:
    """How many published leads one run each could show, with the larger scatter of a record."""
    ahead = leads().stack()
    ahead = ahead[ahead > 0]
    rows = {}
    for words, result in records.items():
        worst = max(scatter(result)[m][0] for m in PAIR)
        rows[words] = {
            "sigma": worst,
            "one run each shows": SHOWN * worst,
            "leads shown": int((ahead > SHOWN * worst).sum()),
            "published leads": len(ahead),
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def leads_by_place() -> dict[tuple[str, str], pd.Series]:
    """`{(opponent, "in domain" or "on BBH"): R-LoRA's leads over it}`, where there are any."""
    ahead = leads()
    places = {}
    for opponent in ahead:
        own = ahead[opponent].dropna()
        outside = own.index.str.contains(OUTSIDE)
        for where, part in (("in domain", own[~outside]), (f"on {OUTSIDE}", own[outside])):
            if len(part):
                places[opponent, where] = part
    return places


def leads_plot(records: dict[str, dict]) -> Figure:
    """Each published lead, in the row of its opponent; a band for each record, in which one run
    each shows nothing. A mark is filled where it lies outside the narrowest band."""
    table = shown_table(records).sort_values("sigma", ascending=False)
    limits = table["one run each shows"]
    places = leads_by_place()
    every = leads().stack()
    left, right = every.min() - 1, every.max() + 1
    figure, ax = plt.subplots(figsize=(7.0, 3.7))
    greys = np.linspace(0.95, 0.85, len(limits))
    for (words, limit), grey in zip(limits.items(), greys, strict=True):
        ax.axvspan(max(-limit, left), min(limit, right), color=str(grey), linewidth=0, zorder=0)
        ax.text(min(limit, right), -0.9, f"{words}: ±{limit:.1f} ", ha="right", va="center")
    ax.vlines(0, -0.5, len(places) - 0.5, color="black", linewidth=1)
    for y, ((opponent, _), own) in enumerate(places.items()):
        for part, fill in ((own.abs() > limits.min(), "full"), (own.abs() <= limits.min(), "none")):
            style = METHOD_STYLES[STYLES[opponent]] | {"linestyle": "", "fillstyle": fill}
            ax.plot(own[part], np.full(part.sum(), y), **style, markersize=7)
    ax.set_yticks(range(len(places)), [", ".join(place) for place in places])
    ax.set(xlim=(left, right), ylim=(len(places) - 0.5, -1.4))
    ax.set_xlabel("← other better      R-LoRA less the other, points      R-LoRA better →")
    found = [f"{count} with the luck of our {name}" for name, count in table["leads shown"].items()]
    total = table["published leads"].iloc[0]
    ax.set_title(f"Of {total} published leads one run each could show\n{', '.join(found[::-1])}")
    ax.grid(axis="y", visible=False)
    return figure
