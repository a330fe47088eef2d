"""R-LoRA less plain LoRA of equal size in every comparison there is: the answer on one screen."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..runs.plan import PLAN, RECORDS, load_plan, read_all
from .loading import read_block
from .questions import differences, family
from .rows import contrast

LANGUAGE = {  # block: what was compared; seeds and test rows both count in their intervals
    "language": "SmolLM2, 8 different tasks",
    "language-related": "SmolLM2, 5 related tasks",
    "language-related-again": "SmolLM2, 5 related tasks, fresh seeds",
}
OTHERS = {
    "strings": "10 string tasks",
    "strings-different-4": "4 different string tasks",
    "strings-related-4": "4 related string tasks",
    "strings-different-8": "8 different string tasks",
    "strings-related-8": "8 related string tasks",
    "synthetic": "10 string tasks, dropout 0.1",
    "different-2": "2 different string tasks, dropout 0.1",
    "related-2": "2 related string tasks, dropout 0.1",
    "different-4": "4 different string tasks, dropout 0.1",
    "related-4": "4 related string tasks, dropout 0.1",
    "different-8": "8 different string tasks, dropout 0.1",
    "related-8": "8 related string tasks, dropout 0.1",
    "sentences": "MiniLM, 5 real tasks",
    "sentences-related": "MiniLM, 3 real tasks of sentiment",
}


@dataclass(frozen=True)
class Line:
    """R-LoRA less LoRA in one comparison, in percentage points with the 95 % interval."""

    block: str
    what: str
    seeds: int
    mean: float
    low: float
    high: float
    verdict: str

    def sentence(self) -> str:
        """The line in words."""
        by = f"{self.mean:+.1f} points ({self.low:+.1f} to {self.high:+.1f})".replace("-", "−")
        return f"{self.what}, {self.seeds} seeds: {by}: {self.verdict}."


def overview(plan: Path = PLAN, records: Path = RECORDS) -> tuple[list[Line], list[str]]:
    """A line for each comparison whose seeds are all run, and what is planned and not done yet.

    The verdicts of the language model are those of the plan, each for itself; the others are
    corrected for one another by Holm.
    """
    blocks = load_plan(plan)
    recorded, _ = read_all(blocks, records)
    results, waiting = {}, []
    for name, what in (LANGUAGE | OTHERS).items():
        if name not in blocks:
            continue
        tested = [(r["method"], r["seed"]) for r in recorded[name] if r["stage"] == "test"]
        asked = [(m, s) for m in ("lora", "rlora") for s in blocks[name].seeds]
        if set(asked) <= set(tested):
            results[name] = read_block(blocks, name, records)
        else:
            waiting.append(what)
    lines = []
    for name in [name for name in LANGUAGE if name in results]:
        found = contrast(results[name], "rlora", "lora")
        margin = blocks[name].margin
        lines.append(_line(name, found.seeds, found.mean, found.interval(), found.verdict(margin)))
    others = [name for name in OTHERS if name in results]
    for c in family({name: differences(results[name], "rlora", "lora") for name in others}):
        lines.append(_line(c.name, len(c.values), c.mean, (c.low, c.high), c.verdict))
    return lines, waiting


def _line(name: str, seeds: int, mean: float, interval: Sequence[float], verdict: str) -> Line:
    what = (LANGUAGE | OTHERS)[name]
    return Line(name, what, seeds, mean, *interval, verdict)
