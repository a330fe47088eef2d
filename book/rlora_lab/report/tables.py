"""Tables of recorded runs: pandas DataFrames of numbers, which `shown` and `text` make readable.

| table | what |
| --- | --- |
| `scores_table` | a row for each method: rate, size, scores, spreads, cosines, costs |
| `tasks_table` | a row for each task, two columns for each method: mean and spread over seeds |
| `contrast_table` | a row for each contrast: difference, interval, p, Holm, detectable, verdict |
| `correlation_table` | head similarity against accuracy: r, overall and within methods |
| `rates_table` | the validation score at each learning rate, and the chosen rate |
| `tuning_table` | where more than rates was tried: each setting, and the chosen ones |
| `looks_table` | scores on validation data on the way |
| `advice_table` | which of plain LoRA, M-LoRA and R-LoRA to use when |

Intervals are 95 %, between the columns "from" and "to". Those of chapter 10 are in
`rlora_lab.report.published`.
"""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from pandas.io.formats.style import Styler

from ..drawing.style import METHOD_STYLES
from ..errors import LabError
from .loading import chosen_records, score_array, tasks_with
from .questions import (
    Contrast,
    advise,
    correlation,
    interval,
    rate_means,
    similarity_points,
)

FORMATS = {  # of columns by name; other numbers have one digit, whole ones none
    "learning rate": "{:g}",
    "chosen": "{:g}",
    "to R-LoRA's": "{:+.1%}",
    "cosine of heads": "{:.3f}",
    "cosine of change": "{:.3f}",
    "routing entropy / ln N": "{:.3f}",
    "difference": "{:+.2f}",
    "R-LoRA less LoRA": "{:+.2f}",
    "r": "{:+.2f}",
    "from": "{:+.2f}",
    "to": "{:+.2f}",
    "p": "{:.3f}",
    "p after Holm": "{:.3f}",
    "lora_dropout": "{:g}",
    "lora_alpha": "{:g}",
    "gamma": "{:g}",
    "detectable": "{:.2f}",
}
BY_ALGEBRA = {  # when: what to use, because; chapters 04 and 07
    "the update must be merged into W0": ("plain LoRA, M-LoRA", "a router can't be merged"),
    "served by a stock LoRA server": (
        "plain LoRA, or export_lora",
        "exact only for fixed routing weights, as M-LoRA's are",
    ),
    "you want to see which head does what": ("R-LoRA", "the others have no router to look at"),
}


def _formats(table: pd.DataFrame, form: str) -> dict[object, Callable[[object], str]]:
    found = {}
    for column, kind in table.dtypes.items():
        name = column[-1] if isinstance(column, tuple) else column
        whole = "{:,}" if kind.kind == "i" else form
        found[column] = FORMATS.get(name, whole).format
        if kind.kind not in "if":
            found[column] = str
    return found


def shown(table: pd.DataFrame, form: str = "{:.1f}") -> Styler:
    """A table for a page, its numbers with as many digits as they deserve; a dash where there is
    none. `form` is for columns without a format of their own in `FORMATS`."""
    name = hashlib.sha256(table.to_csv().encode()).hexdigest()[:8]  # the same in every run
    styler = Styler(table, uuid=name, cell_ids=False, table_attributes='class="dataframe"')
    return styler.format(_formats(table, form), na_rep="–")


def text(table: pd.DataFrame, form: str = "{:.1f}", width: int | None = None) -> str:
    """The same for a screen, in lines of a width."""
    return table.to_string(formatters=_formats(table, form), na_rep="–", line_width=width)


def label(name: str) -> str:
    """The name of a method, or of a contrast, with the methods' names as readers know them."""
    head, colon, methods = name.rpartition(": ")
    words = (
        METHOD_STYLES[m]["label"] if m in METHOD_STYLES else m for m in methods.split(" less ")
    )
    return head + colon + " less ".join(words)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else np.nan


def scores_table(result: dict) -> pd.DataFrame:
    """A row for each method: what it was, what it scored and what it cost.

    Scores in per cent with 95 % intervals over seeds; the spreads are standard deviations, over
    seeds (of the mean over tasks) and over tasks (of the mean over seeds). Intervals and spreads
    are NaN for a single seed.
    """
    rows = {}
    for method in result["methods"]:
        records = chosen_records(result, method)
        size = records[0]["adapter_parameters"]
        row = {
            "learning rate": result["chosen"][method] or np.nan,
            "at an end of its sweep": method in result["at_end"],
            "parameters": size,
            "to R-LoRA's": size / (result["rlora_parameters"] or np.nan) - 1,
        }
        for metric in result["metrics"]:
            scores = 100 * score_array(result, method, metric)
            several = len(scores) > 1
            row[metric] = scores.mean()
            row[f"{metric} from"], row[f"{metric} to"] = (
                interval(scores.mean(1))[1:] if several else (np.nan, np.nan)
            )
            if metric == result["metrics"][0]:
                row["spread over seeds"] = scores.mean(1).std(ddof=1) if several else np.nan
                row["spread over tasks"] = scores.mean(0).std(ddof=1)
        for kind, name in (("heads", "cosine of heads"), ("change", "cosine of change")):
            row[name] = _mean([r["similarity"][kind] for r in records if r["similarity"]])
        entropies = [np.mean(r["entropy"]) for r in records if r.get("entropy")]
        row["routing entropy / ln N"] = _mean(entropies)
        seconds = [r["seconds"] for r in records if "seconds" in r]
        row["seconds"] = float(np.median(seconds)) if seconds else np.nan
        row["kept MiB"] = _mean([r["kept_bytes"] / 2**20 for r in records if "kept_bytes" in r])
        rows[label(method)] = row
    return pd.DataFrame.from_dict(rows, orient="index")


def tasks_table(result: dict, metric: str | None = None) -> pd.DataFrame:
    """Test score of each task in per cent: mean and standard deviation (±) over seeds."""
    columns = {}
    for method in result["methods"]:
        scores = 100 * score_array(result, method, metric)
        columns[label(method), "mean"] = scores.mean(0)
        columns[label(method), "±"] = pd.DataFrame(scores).std().to_numpy()
    return pd.DataFrame(columns, index=tasks_with(result, metric or result["metrics"][0]))


def contrast_table(contrasts: Sequence[Contrast]) -> pd.DataFrame:
    """Differences in percentage points with their 95 % intervals and what they say."""
    rows = {
        label(c.name): {
            "difference": c.mean,
            "from": c.low,
            "to": c.high,
            "seeds": len(c.values),
            "p": c.p,
            "p after Holm": c.holm,
            "detectable": c.detectable,
            "verdict": c.verdict,
        }
        for c in contrasts
    }
    return pd.DataFrame.from_dict(rows, orient="index")


def correlation_table(result: dict) -> pd.DataFrame:
    """Cosine of the heads, and of their change, against the test score of a run: Pearson's r."""
    rows = {}
    for kind, name in (("heads", "cosine of heads"), ("change", "cosine of change")):
        points = pd.DataFrame(similarity_points(result, kind), columns=["method", "x", "y"])
        groups = {"all runs": (points, None), "within methods": (points, points["method"])}
        for method, own in points.groupby("method", sort=False):
            groups[label(method)] = own, None
        for group, (runs, within) in groups.items():
            try:
                r, low, high = correlation(runs["x"], runs["y"], within)
            except LabError:  # too few runs for an interval
                continue
            rows[f"{name}, {group}"] = {"r": r, "from": low, "to": high, "runs": len(runs)}
    return pd.DataFrame.from_dict(rows, orient="index")


def rates_table(result: dict) -> pd.DataFrame:
    """Validation score in per cent at each learning rate, a mean over sweep seeds."""
    means = {
        label(method): {rate: np.mean(v) for rate, v in rate_means(result, method).items()}
        for method in result["methods"]
    }
    table = pd.DataFrame.from_dict(means, orient="index").sort_index(axis=1)
    table.columns = [f"{rate:g}" for rate in table.columns]
    table["chosen"] = [result["chosen"][method] for method in result["methods"]]
    return table


def tuning_table(result: dict) -> pd.DataFrame:
    """Validation score in per cent of every setting that was tried for the tuned methods, best
    first: of the first sweep seed, and the mean where all sweep seeds were run."""
    rows = []
    for method, tried in result["sweeps"].items():
        for choice, by_seed in tried.items():
            taken = choice.learning_rate == result["chosen"][method]
            rows.append(
                {
                    "method": label(method),
                    "learning rate": choice.learning_rate,
                    **dict(choice.tuned),
                    "first seed": 100 * by_seed[result["sweep_seeds"][0]],
                    "mean": 100 * np.mean([*by_seed.values()]) if len(by_seed) > 1 else np.nan,
                    "chosen": "x"
                    if taken and dict(choice.tuned) == result["tuned"][method]
                    else "",
                }
            )
    table = pd.DataFrame(rows).sort_values("first seed", ascending=False)
    return table.sort_values("method", kind="stable").set_index("method")


def looks_table(result: dict) -> pd.DataFrame:
    """Scores in per cent on validation data after a quarter and a half of the steps, and on test
    data at the end; means over tasks and seeds."""
    metric = result["metrics"][0]
    rows = {}
    for method in result["methods"]:
        records = [r for r in chosen_records(result, method) if r.get("looks")]
        if not records:
            continue
        steps = [step for step, _ in records[0]["looks"]]
        means = np.mean([[np.mean(s[metric]) for _, s in r["looks"]] for r in records], 0)
        rows[label(method)] = {
            f"{step} steps": 100 * m for step, m in zip(steps, means, strict=True)
        }
        rows[label(method)]["at the end, test"] = 100 * score_array(result, method).mean()
    return pd.DataFrame.from_dict(rows, orient="index")


def advice_table(situations: dict[str, dict], costs: dict) -> pd.DataFrame:
    """When to use which of `SIMPLEST_FIRST`, with R-LoRA's difference from LoRA, or why.

    Args:
        situations: `{when: result}`, a row each by `advise`.
        costs: the result whose time and memory of training decide where these are what is short.
    """
    rows = {}
    for when, result in situations.items():
        use, found = advise(result)
        c = next(c for c in found if c.name == "rlora less lora")
        numbers = {"R-LoRA less LoRA": c.mean, "from": c.low, "to": c.high}
        rows[when] = {"use": label(use), **numbers, "because": ""}
    spent = (
        np.median([[r["seconds"], r["kept_bytes"]] for r in chosen_records(costs, m)], 0)
        for m in ("rlora", "lora")
    )
    time, memory = np.divide(*spent)
    rows["time or memory are what is short"] = {
        "use": "plain LoRA" if min(time, memory) > 1 else "no reason for either: chapter 09",
        "because": f"R-LoRA took {time:.2f} times LoRA's time and kept {memory:.2f} times "
        "its memory",
    }
    for when, (use, because) in BY_ALGEBRA.items():
        rows[when] = {"use": use, "because": because}
    return pd.DataFrame.from_dict(rows, orient="index")
