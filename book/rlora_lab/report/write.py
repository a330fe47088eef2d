"""`python -m rlora_lab report`: every table and picture that the records give, in a folder."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from ..drawing.style import book_style
from ..errors import LabError
from ..runs.plan import PLAN, RECORDS, Block, load_plan, read_all
from ..runs.record import write_whole
from .loading import provenance, read_block
from .overview import overview
from .pictures import (
    MAIN,
    forest,
    overview_plot,
    rate_curves,
    related_plot,
    similarity_plot,
    task_dots,
)
from .published import PAIR, leads, leads_plot, published, scatter_table, shown_table
from .questions import (
    SIMPLEST_FIRST,
    Contrast,
    ideas,
    relatedness,
    rlora_less,
    similarity_points,
)
from .rows import chances_table, chosen_spread
from .tables import (
    advice_table,
    contrast_table,
    correlation_table,
    looks_table,
    rates_table,
    scores_table,
    tasks_table,
    text,
    tuning_table,
)

KINDS = ("different", "related")
FIRST = ", dropout 0.1"  # the first record of the string tasks
STRINGS = {  # pairs of different and related ones, by block
    **{f"{n} tasks": [f"strings-{kind}-{n}" for kind in KINDS] for n in (4, 8)},
    **{f"{n} tasks{FIRST}": [f"{kind}-{n}" for kind in KINDS] for n in (2, 4, 8)},
}
PAIRS = STRINGS | {"SmolLM2": ["language", "language-related"]}
SITUATIONS = {  # rows of the advice, by block
    "ten mixed string tasks": "strings",
    f"ten mixed string tasks{FIRST}": "synthetic",
    **{
        f"{words}, {kind}": block
        for words, blocks in STRINGS.items()
        for kind, block in zip(KINDS, blocks, strict=True)
    },
    "five real tasks": "sentences",
    "three real tasks of sentiment": "sentences-related",
    "eight language tasks": "language",
}
SCATTER = {"string tasks": "synthetic", "real text": "sentences"}  # chapter 10's


class Report:
    """What is written: the parts of report.md, and a file for each table and picture."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.parts = ["# What the recorded runs say"]

    def say(self, words: str) -> None:
        self.parts.append(words)

    def table(self, name: str, title: str, content: pd.DataFrame, form: str = "{:.1f}") -> None:
        write_whole(self.folder / f"{name}.csv", content.to_csv())
        self.say(f"### {title}\n\n```\n{text(content, form)}\n```")

    def picture(self, name: str, figure: Figure) -> None:
        for ending in ("png", "svg"):
            metadata = {"Date": None} if ending == "svg" else None
            figure.savefig(self.folder / f"{name}.{ending}", metadata=metadata)
        plt.close(figure)
        self.say(f"![{name}]({name}.png)")

    def contrasts(self, name: str, title: str, found: list[Contrast], *ends: str) -> None:
        self.table(name, title, contrast_table(found))
        self.picture(name, forest(found, title, *ends))

    def related(self, name: str, title: str, found: dict[str, list[Contrast]]) -> None:
        for kind, contrasts in found.items():
            what = f"less LoRA, {kind} tasks"
            if kind == "interaction":
                what = "gain where different less gain where related"
            self.table(f"{name}-{kind}", f"{title}: {what}", contrast_table(contrasts))
        self.picture(name, related_plot(found))

    def block(self, name: str, result: dict) -> None:
        self.table(f"{name}-scores", "Scores", scores_table(result))
        self.table(f"{name}-tasks", "Tasks", tasks_table(result))
        tuned = any(result["tuned"].values())
        if tuned:
            self.table(f"{name}-looks", "On the way", looks_table(result))
        if tuned and result["sweep_seeds"]:
            self.table(f"{name}-tuning", "Settings that were tried", tuning_table(result))
        elif result["sweep_seeds"]:
            self.table(f"{name}-rates", "Learning rates", rates_table(result))
            self.picture(f"{name}-rates", rate_curves(result))
        if "rlora" in result["methods"] and len(result["methods"]) > 1:
            for metric in result["metrics"]:
                found = rlora_less(result, metric)
                ends = "the other better", "R-LoRA better"
                title = f"R-LoRA less each other, {metric}"
                self.contrasts(f"{name}-{metric}-rlora-less", title, found, *ends)
        parts = ideas(result)
        if parts:
            self.contrasts(f"{name}-ideas", "What each part brings", parts)
        self.picture(f"{name}-tasks", task_dots(result, MAIN))
        if similarity_points(result):
            rows = correlation_table(result)
            self.table(f"{name}-correlation", "Head similarity against accuracy", rows)
            for kind in ("heads", "change"):
                self.picture(f"{name}-similarity-{kind}", similarity_plot(result, kind))

    def together(self, blocks: dict[str, dict]) -> None:
        """What is said of several blocks."""
        pairs = {
            words: (blocks[different], blocks[related])
            for words, (different, related) in PAIRS.items()
            if {different, related} <= blocks.keys()
        }
        if pairs:
            self.say("## Related against different tasks")
            self.related("relatedness", "String and language tasks", relatedness(pairs))
        if {"sentences", "sentences-related"} <= blocks.keys():
            pair = {"real text": (blocks["sentences"], blocks["sentences-related"])}
            found = relatedness(pair, tasks=blocks["sentences-related"]["tasks"])
            self.related("relatedness-sentences", "Real text", found)

        def those(names: dict[str, str], methods: tuple[str, ...]) -> dict[str, dict]:
            return {
                words: blocks[name]
                for words, name in names.items()
                if name in blocks and set(methods) <= set(blocks[name]["methods"])
            }

        situations = those(SITUATIONS, SIMPLEST_FIRST)
        if situations:
            self.say("## Which one to use")
            costs = next(iter(situations.values()))
            rows = advice_table(situations, costs)
            self.table("advice", "Rule: the simplest that is not beaten", rows)
        self.say("## The published numbers")
        self.table("published", "Average accuracies", published(), "{:.2f}")
        self.table("published-leads", "R-LoRA less each other row", leads(), "{:+.2f}")
        spread = those(SCATTER, PAIR)
        if spread:
            title = "Scatter over seeds, percentage points"
            self.table("scatter", title, scatter_table(spread))
            self.table("scatter-leads", "What one run each could show", shown_table(spread))
            self.picture("scatter-leads", leads_plot(spread))

    def chances(self, plan: dict[str, Block], records: Path) -> None:
        """What so many seeds can show of a language model, from the rows of the sweep."""
        for name, block in plan.items():
            if not block.dropouts:
                continue
            try:
                rows = chances_table(chosen_spread(plan, name, read_all(plan, records)[0]))
            except LabError as error:
                self.say(f"## What can be shown, {name}\n\n{error}")
                continue
            title = "Share of cases in which equal methods are found equivalent, by margin"
            self.table(f"{name}-chances", title, rows, "{:.2f}")

    def overview(self, plan: Path, records: Path) -> None:
        """The first picture, and in words."""
        lines, waiting = overview(plan, records)
        if lines:
            self.say("## R-LoRA less LoRA of equal size")
            self.picture("overview", overview_plot(lines))
            self.say("\n".join(f"- {line.sentence()}" for line in lines))
        if waiting:
            self.say("Planned and not done yet: " + ", ".join(waiting) + ".")


def write_report(folder: Path, plan: Path = PLAN, records: Path = RECORDS) -> str:
    """Make every table and picture of the comparisons that have been scored on test data.

    Writes report.md, a CSV file for each table, a PNG and an SVG for each picture, and returns the
    text of report.md.
    """
    folder.mkdir(parents=True, exist_ok=True)
    report = Report(folder)
    asked = load_plan(plan)
    blocks = {}
    with book_style(), plt.rc_context({"svg.hashsalt": "rlora"}):
        report.overview(plan, records)
        report.chances(asked, records)
        for name in [name for name, block in asked.items() if block.kind == "compare"]:
            try:
                result = read_block(asked, name, records)
            except LabError as error:
                report.say(f"## {name}\n\n{error}")
                continue
            report.say(f"## {name}\n\n{provenance(result)}")
            if len(result["seeds"]) < 2:
                report.say("Too few seeds for an interval yet.")
                continue
            blocks[name] = result
            report.block(name, result)
        report.together(blocks)
    said = "\n\n".join(report.parts) + "\n"
    write_whole(folder / "report.md", said)
    return said
