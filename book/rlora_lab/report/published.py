"""The published numbers, and how little scatter over seeds their leads would need.

Average accuracies in per cent, as printed. "v1" is the first version of the R-LoRA paper,
https://arxiv.org/abs/2502.15455v1; "later" the same group's https://arxiv.org/abs/2508.05078, at
equal numbers of trained parameters.
"""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy import stats

from ..drawing.style import LINE_STYLES, METHOD_STYLES, OKABE_ITO
from .loading import score_array
from .questions import differences

ROWS = ("LoRA", "HydraLoRA", "+ head dropout", "+ random heads", "R-LoRA")
_ = float("nan")  # the table has no such row
PUBLISHED = {  # (source, what was measured): the average of each of ROWS
    ("v1, Table 5", "8 tasks, Qwen2.5-0.5B"): (_, 64.13, 66.22, 66.31, 67.31),
    ("v1, Table 5", "8 tasks, Qwen2.5-3B"): (_, 82.66, 82.84, 83.34, 84.09),
    ("v1, Table 4", "5 tasks, Qwen2.5-0.5B"): (_, 72.69, 73.02, 72.98, 73.59),
    ("v1, Table 2", "a single domain"): (_, 37.08, _, _, 37.13),
    ("v1, Table 3", "Flan to BBH, LLaMA-2 7B"): (37.2, 41.8, _, _, 42.3),
    ("v1, Table 3", "Flan to BBH, LLaMA-2 13B"): (40.9, 44.7, _, _, 45.4),
    ("later", "8 tasks, Qwen2.5-3B"): (76.48, _, _, _, 77.99),
    ("later", "8 tasks, 7B"): (80.48, _, _, _, 81.74),
    ("later", "BBH, 7B"): (49.51, _, _, _, 49.51),
}
PAIR = ("lora", "rlora")  # whose scatter is set against the leads
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
            label = METHOD_STYLES[name]["label"] if alone else "R-LoRA less LoRA, paired"
            rows[f"{words}: {label}"] = {
                "seeds": len(result["seeds"]),
                "sigma": sigma,
                "sigma from": low,
                "sigma to": high,
                "if luck were independent": np.nan if alone else independent,
                "one run each shows": (SHOWN if alone else 2) * sigma,
            }
    return pd.DataFrame.from_dict(rows, orient="index")


def shown_table(records: dict[str, dict]) -> pd.DataFrame:
    """How many published leads one run each could show, with the larger scatter of a record."""
    needed = (leads() / SHOWN).stack()
    needed = needed[needed > 0]
    rows = {}
    for words, result in records.items():
        worst = max(scatter(result)[m][0] for m in PAIR)
        rows[words] = {
            "sigma": worst,
            "leads shown": int((needed > worst).sum()),
            "published leads": len(needed),
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def leads_plot(records: dict[str, dict]) -> Figure:
    """For each published lead, the scatter below which one run each shows it, as a mark; as lines
    the scatter of LoRA and of R-LoRA in each record."""
    needed = leads() / SHOWN
    figure, ax = plt.subplots(figsize=(7.2, 3.4))
    looks = zip(needed.columns, ["black", "orange", "sky", "green"], "os^v", strict=True)
    for column, color, marker in looks:
        style = {"color": OKABE_ITO[color], "marker": marker, "linestyle": "", "markersize": 6}
        above = needed[column].where(needed[column] > 0)
        ax.plot(above, range(len(needed)), label=f"R-LoRA less {column}", **style)
    for (words, result), line in zip(records.items(), LINE_STYLES, strict=False):
        found = scatter(result)
        for method in PAIR:
            style = METHOD_STYLES[method] | {"marker": "", "linestyle": line}
            style["label"] = f"our {words}: {style['label']}"
            ax.axvline(found[method][0], **style)
    ax.set_yticks(range(len(needed)), needed.index, fontsize=7)
    ax.set(xscale="log", ylim=(len(needed) - 0.4, -0.6))
    ax.set_xlabel("standard deviation over seeds, percentage points")
    ax.set_title("Below this scatter, one run each shows the published lead")
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=7)
    return figure
