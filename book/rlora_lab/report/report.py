"""`python -m rlora_lab report`: the tables and pictures that the evidence gives, for chapters too.

Tables are pandas DataFrames of finished text; pictures are matplotlib Figures. Each takes what
`rlora_lab.report.results.load_evidence` returns, or contrasts that `against_rlora`, `ideas` and
`relatedness` make of it.

| tables | what |
| --- | --- |
| `scores_table` | a row for each method: rate, size, scores, spreads, cosines, costs |
| `tasks_table` | a row for each task, a column for each method: mean and spread over seeds |
| `contrast_table` | a row for each contrast: difference, interval, p, Holm, detectable, verdict |
| `correlation_table` | head similarity against accuracy: r, overall and within methods |
| `rates_table` | the validation score at each learning rate, the chosen one marked |
| `advice_table` | which of plain LoRA, M-LoRA and R-LoRA to use when, and why |

| pictures | what |
| --- | --- |
| `forest` | contrasts with their intervals |
| `task_dots` | each seed's score on each task |
| `similarity_plot` | head similarity against accuracy, a point for each run |
| `rate_curves` | validation score against learning rate |
| `related_plot` | what a method gains where tasks are related, and where they differ |

Those of chapter 10 are in `rlora_lab.report.published`. What that chapter measures of the seven
departures it measures as it runs, from no record.
"""

import os
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ..drawing.style import METHOD_STYLES, OKABE_ITO, book_style
from ..errors import LabError
from ..runs.plan import PLAN, RECORDS, load_plan
from .published import PAIR, leads, leads_plot, points, published, scatter_table, shown_table
from .results import (
    Contrast,
    against_rlora,
    chosen_records,
    correlation,
    differences,
    family,
    ideas,
    interval,
    load_evidence,
    provenance,
    relatedness,
    score_array,
    similarity_points,
)

MAIN = ("rlora", "lora", "one-head", "mlora", "hydralora")  # all twelve would hide one another
SIZES = (2, 4, 8)
SIMPLEST_FIRST = ("lora", "mlora", "rlora")
SITUATIONS = {  # rows of the advice by block
    "ten mixed string tasks": "synthetic",
    **{
        f"{size} tasks, {kind}": f"{kind}-{size}"
        for size in SIZES
        for kind in ("different", "related")
    },
    "five real tasks": "sentences",
    "three real tasks of sentiment": "sentences-related",
}
SCATTER = {"string tasks": "synthetic", "real text": "sentences"}  # chapter 10's
BY_ALGEBRA = {  # when: what to use, because; chapters 04 and 07
    "the update must be merged into W0": ("plain LoRA, M-LoRA", "a router can't be merged"),
    "served by a stock LoRA server": (
        "plain LoRA, or export_lora",
        "exact only for fixed routing weights, as M-LoRA's are",
    ),
    "you want to see which head does what": ("R-LoRA", "the others have no router to look at"),
}


def label(name: str) -> str:
    """The name of a method, or of a contrast, with the methods' names as readers know them."""
    head, colon, methods = name.rpartition(": ")
    words = (
        METHOD_STYLES[m]["label"] if m in METHOD_STYLES else m for m in methods.split(" less ")
    )
    return head + colon + " less ".join(words)


def _style(method: str, **changes) -> dict:
    return METHOD_STYLES[method] | changes


def scores_table(result: dict) -> pd.DataFrame:
    """A row for each method: what it was, what it scored and what it cost.

    Scores in per cent with 95 % intervals over seeds; the spreads are standard deviations, over
    seeds (of the mean over tasks) and over tasks (of the mean over seeds).
    """
    rows = {}
    for method in result["methods"]:
        records = chosen_records(result, method)
        scores = 100 * score_array(result, method)
        mean, low, high = interval(scores.mean(1))
        size = records[0]["adapter_parameters"]
        row = {
            "learning rate": f"{result['chosen'][method]:g}"
            + " (at the end of its sweep)" * (method in result["at_end"]),
            "parameters": f"{size:,}",
            "to R-LoRA's": f"{size / result['rlora_parameters'] - 1:+.1%}"
            if result["rlora_parameters"]
            else "",
            result["metrics"][0]: f"{mean:.1f} ({low:.1f} to {high:.1f})",
            "spread over seeds": f"{scores.mean(1).std(ddof=1):.1f}",
            "spread over tasks": f"{scores.mean(0).std(ddof=1):.1f}",
        }
        for metric in result["metrics"][1:]:
            values = 100 * score_array(result, method, metric).mean(1)
            row[metric] = "{:.1f} ({:.1f} to {:.1f})".format(*interval(values))
        for kind, name in (("heads", "cosine of heads"), ("change", "cosine of change")):
            cosines = [r["similarity"][kind] for r in records if r["similarity"]]
            row[name] = f"{np.mean(cosines):.3f}" if cosines else "–"
        entropies = [np.mean(r["entropy"]) for r in records if r["entropy"]]
        row["routing entropy / ln N"] = f"{np.mean(entropies):.3f}" if entropies else "–"
        row["seconds"] = f"{np.median([r['seconds'] for r in records]):.1f}"
        row["kept MiB"] = f"{np.mean([r['kept_bytes'] for r in records]) / 2**20:.1f}"
        rows[label(method)] = row
    return pd.DataFrame.from_dict(rows, orient="index")


def tasks_table(result: dict, metric: str | None = None) -> pd.DataFrame:
    """Test score of each task in per cent, mean ± standard deviation over seeds."""
    columns = {}
    for method in result["methods"]:
        scores = 100 * score_array(result, method, metric)
        columns[label(method)] = [
            f"{mean:.1f} ± {spread:.1f}"
            for mean, spread in zip(scores.mean(0), scores.std(0, ddof=1), strict=True)
        ]
    return pd.DataFrame(columns, index=result["tasks"])


def contrast_table(contrasts: Sequence[Contrast]) -> pd.DataFrame:
    """Differences in percentage points with their 95 % intervals and what they say."""
    rows = {
        label(c.name): {
            "difference": f"{c.mean:+.2f}",
            "95 % interval": f"{c.low:+.2f} to {c.high:+.2f}",
            "seeds": str(len(c.values)),
            "p": f"{c.p:.3f}",
            "p after Holm": f"{c.holm:.3f}",
            "detectable": f"{c.detectable:.2f}",
            "verdict": c.verdict,
        }
        for c in contrasts
    }
    return pd.DataFrame.from_dict(rows, orient="index")


def correlation_table(result: dict) -> pd.DataFrame:
    """Cosine of the heads, and of their change, against the test score of a run: Pearson's r."""
    rows = {}
    for kind, name in (("heads", "cosine of heads"), ("change", "cosine of change")):
        points = similarity_points(result, kind)
        methods, x, y = zip(*points, strict=True) if points else ((), (), ())
        groups = {"all runs": (x, y, None), "within methods": (x, y, methods)}
        for method in dict.fromkeys(methods):
            own = [i for i, m in enumerate(methods) if m == method]
            groups[label(method)] = [x[i] for i in own], [y[i] for i in own], None
        for group, values in groups.items():
            try:
                r, low, high = correlation(*values)
            except LabError:  # too few runs for an interval
                continue
            rows[f"{name}, {group}"] = {
                "r": f"{r:+.2f}",
                "95 % interval": f"{low:+.2f} to {high:+.2f}",
                "runs": str(len(values[0])),
            }
    return pd.DataFrame.from_dict(rows, orient="index")


def _means(result: dict, method: str) -> dict[float, list[float]]:
    """For each rate of a method's sweep, rising, the validation scores of its seeds in per cent."""
    return {
        rate: [100 * by_seed[seed] for seed in result["sweep_seeds"] if seed in by_seed]
        for rate, by_seed in sorted(result["sweeps"][method].items())
    }


def rates_table(result: dict) -> pd.DataFrame:
    """Validation score in per cent at each learning rate, a mean over sweep seeds; * is chosen."""
    rows = {}
    for method in result["methods"]:
        rows[label(method)] = {
            f"{rate:g}": f"{np.mean(v):.1f}" + "*" * (rate == result["chosen"][method])
            for rate, v in _means(result, method).items()
        }
    table = pd.DataFrame.from_dict(rows, orient="index").fillna("")
    return table[sorted(table.columns, key=float)]


def advise(result: dict) -> tuple[str, list[Contrast]]:
    """The first of `SIMPLEST_FIRST` that neither other beats, and the differences that say so.

    Each is compared with each, corrected by Holm for these three questions. So where nothing can
    be told, the simplest stays.
    """
    pairs = list(combinations(SIMPLEST_FIRST, 2))
    found = family({f"{two} less {one}": differences(result, two, one) for one, two in pairs})
    beaten = {
        one if c.verdict == "better" else two
        for (one, two), c in zip(pairs, found, strict=True)
        if c.verdict != "cannot tell"
    }
    return next(method for method in SIMPLEST_FIRST if method not in beaten), found


def advice_table(situations: dict[str, dict], costs: dict) -> pd.DataFrame:
    """When to use which of `SIMPLEST_FIRST`, and why.

    Args:
        situations: `{when: result}`, a row each by `advise`. One random head is no part of that
            rule: the last column sets it against what the rule names.
        costs: the result whose time and memory of training decide where these are what is short.
    """

    def words(c: Contrast) -> str:
        return f"{c.mean:+.1f} ({c.low:+.1f} to {c.high:+.1f}), {c.verdict}"

    rows = {}
    for when, result in situations.items():
        use, found = advise(result)
        head = ""
        if "one-head" in result["methods"]:
            head = words(family({"one-head": differences(result, "one-head", use)})[0])
        because = "; ".join(f"{label(c.name)} {words(c)}" for c in found)
        rows[when] = label(use), because, head
    spent = (
        np.median([[r["seconds"], r["kept_bytes"]] for r in chosen_records(costs, m)], 0)
        for m in ("rlora", "lora")
    )
    time, memory = np.divide(*spent)
    rows["time or memory are what is short"] = (
        "plain LoRA" if min(time, memory) > 1 else "no reason for either: chapter 09",
        f"in the runs on {costs['config']['base']} R-LoRA took {time:.2f} times the time of PEFT's "
        f"LoRA and kept {memory:.2f} times its memory",
        "",
    )
    rows |= {when: (*why, "") for when, why in BY_ALGEBRA.items()}
    columns = ["use", "because", "one random head less it"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns)


def forest(contrasts: Sequence[Contrast], title: str = "", xlabel: str = "") -> Figure:
    """Contrasts as points with their 95 % intervals; filled where Holm's correction leaves them
    standing. A true difference within the grey band would mostly go unseen with these seeds."""
    tall = any(": " in c.name for c in contrasts)  # two lines of text to each
    figure, ax = plt.subplots(figsize=(6.4, 0.9 + (0.38 if tall else 0.3) * len(contrasts)))
    limits = np.array([c.detectable for c in contrasts])
    ax.barh(range(len(contrasts)), 2 * limits, 0.7, -limits, color="#E4E4E4", zorder=0)
    ax.axvline(0, color="black", linewidth=1, linestyle="-", marker="")
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
    ax.set_yticks(range(len(contrasts)), names, fontsize=7 if tall else None)
    ax.set(xlabel=xlabel or "percentage points, 95 % interval", title=title)
    ax.set_ylim(len(contrasts) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)
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
    figure.legend(loc="outside right upper", fontsize=7)
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
    figure.legend(loc="outside right upper", fontsize=7)
    return figure


def rate_curves(result: dict, methods: Sequence[str] | None = None) -> Figure:
    """Validation score against learning rate, mean over sweep seeds; a ring marks the chosen."""
    figure, ax = plt.subplots(figsize=(6.4, 3.6))
    every = set()
    for method in methods or result["methods"]:
        means = {rate: np.mean(values) for rate, values in _means(result, method).items()}
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
    figure.legend(loc="outside right upper", fontsize=7)
    return figure


def related_plot(found: dict[str, list[Contrast]], against: str = "lora") -> Figure:
    """What methods gain over another on related and on different tasks: see `relatedness`."""
    figure, ax = plt.subplots(figsize=(6.4, 0.9 + 0.34 * len(found["related"])))
    looks = {
        "different": {"color": OKABE_ITO["vermillion"], "marker": "P", "linestyle": "-"},
        "related": {"color": OKABE_ITO["blue"], "marker": "o", "linestyle": "-"},
    }
    ax.axvline(0, color="black", linewidth=1, linestyle="-", marker="")
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
    ax.grid(axis="y", visible=False)
    figure.legend(loc="outside upper center", ncols=2)
    return figure


def _write(folder: Path, name: str, text: str) -> None:
    temporary = folder / f".{name}.{os.getpid()}.tmp"
    temporary.write_text(text)
    os.replace(temporary, folder / name)


@book_style()
def write_report(folder: Path, plan: Path = PLAN, records: Path = RECORDS) -> str:
    """Make every table and picture of the blocks that have been scored on test data.

    Writes report.md, a CSV file for each table, a PNG and an SVG for each picture, and returns the
    text of report.md.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = ["# What the recorded runs say"]

    def table(name: str, title: str, content: pd.DataFrame) -> None:
        _write(folder, f"{name}.csv", content.to_csv())
        parts.append(f"### {title}\n\n```\n{content.to_string()}\n```")

    def picture(name: str, figure: Figure) -> None:
        for ending in ("png", "svg"):
            metadata = {"Date": None} if ending == "svg" else None
            figure.savefig(folder / f"{name}.{ending}", metadata=metadata)
        plt.close(figure)
        parts.append(f"![{name}]({name}.png)")

    def related(name: str, title: str, found: dict[str, list[Contrast]]) -> None:
        for kind, contrasts in found.items():
            what = "gain where different less gain where related"
            what = what if kind == "interaction" else f"less LoRA, {kind} tasks"
            table(f"{name}-{kind}", f"{title}: {what}", contrast_table(contrasts))
        picture(name, related_plot(found))

    blocks = {}
    for block in load_plan(plan):
        try:
            blocks[block] = load_evidence(block, say=False, plan=plan, records=records)
        except LabError as error:
            parts.append(f"## {block}\n\n{error}")
            continue
        result = blocks[block]
        parts.append(f"## {block}\n\n{provenance(result)}")
        if len(result["seeds"]) < 2:
            parts.append("Too few seeds for an interval yet.")
            del blocks[block]
            continue
        table(f"{block}-scores", "Scores", scores_table(result))
        table(f"{block}-tasks", "Tasks", tasks_table(result))
        if result["sweep_seeds"]:
            table(f"{block}-rates", "Learning rates", rates_table(result))
            picture(f"{block}-rates", rate_curves(result))
        if "rlora" in result["methods"] and len(result["methods"]) > 1:
            for metric in result["metrics"]:
                contrasts = against_rlora(result, metric)
                title = f"Less R-LoRA, {metric}"
                table(f"{block}-{metric}-against-rlora", title, contrast_table(contrasts))
                picture(f"{block}-{metric}-against-rlora", forest(contrasts, title))
        if contrasts := ideas(result):
            table(f"{block}-ideas", "What each part brings", contrast_table(contrasts))
            picture(f"{block}-ideas", forest(contrasts, "What each part brings"))
        picture(f"{block}-tasks", task_dots(result, MAIN))
        if similarity_points(result):
            rows = correlation_table(result)
            table(f"{block}-correlation", "Head similarity against accuracy", rows)
            for kind in ("heads", "change"):
                picture(f"{block}-similarity-{kind}", similarity_plot(result, kind))
    pairs = {
        f"{size} tasks": (blocks[f"different-{size}"], blocks[f"related-{size}"])
        for size in SIZES
        if {f"different-{size}", f"related-{size}"} <= blocks.keys()
    }
    if pairs:
        parts.append("## Related against different tasks")
        related("relatedness", "String tasks", relatedness(pairs))
    if {"sentences", "sentences-related"} <= blocks.keys():
        pair = {"real text": (blocks["sentences"], blocks["sentences-related"])}
        found = relatedness(pair, tasks=blocks["sentences-related"]["tasks"])
        related("relatedness-sentences", "Real text", found)

    def has(block: str, *methods: str) -> bool:
        return block in blocks and set(methods) <= set(blocks[block]["methods"])

    situations = {
        when: blocks[block] for when, block in SITUATIONS.items() if has(block, *SIMPLEST_FIRST)
    }
    if situations:
        parts.append("## Which one to use")
        costs = next(iter(situations.values()))
        table("advice", "Rule: the simplest that is not beaten", advice_table(situations, costs))
    parts.append("## The published numbers")
    table("published", "Average accuracies", points(published()))
    table("published-leads", "R-LoRA less each other row", points(leads(), "+.2f"))
    spread = {words: blocks[block] for words, block in SCATTER.items() if has(block, *PAIR)}
    if spread:
        table("scatter", "Scatter over seeds, percentage points", scatter_table(spread))
        table("scatter-leads", "What one run each could show", shown_table(spread))
        picture("scatter-leads", leads_plot(spread))
    text = "\n\n".join(parts) + "\n"
    _write(folder, "report.md", text)
    return text
