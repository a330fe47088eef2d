"""Draw the forest plot of the first page and the README from the records, and say its first line.

    python book/pictures.py

It writes `_static/evidence.svg`: R-LoRA less LoRA of equal size in the main comparisons, as chapter
08 draws them all, for a phone's width. The numbers stand in the file as well. Then it prints the
sentence with which `index.md` and `README.md` begin. A test holds all three to the records: when a
comparison is finished, draw again, and put the sentence there.
"""

import textwrap
from pathlib import Path

import matplotlib.pyplot as plt

from rlora_lab.drawing.style import book_style
from rlora_lab.report.overview import Line, overview
from rlora_lab.report.pictures import overview_plot

PICTURE = Path(__file__).resolve().parent / "_static" / "evidence.svg"
# One row each: the first of these blocks that is finished.
MAIN = (
    ("language",),
    ("language-related",),
    ("strings", "synthetic"),
    ("strings-different-8", "different-8"),
    ("strings-related-8", "related-8"),
    ("sentences",),
)
WIDTH = 3.5  # inches: type of 9 points is 12 pixels on a screen of 390


def main_lines() -> list[Line]:
    """The main comparisons that are finished, the first of them the one that the sentence tells."""
    lines = {line.block: line for line in overview()[0]}
    finished = [[lines[block] for block in blocks if block in lines] for blocks in MAIN]
    return [found[0] for found in finished if found]


def sentence(line: Line) -> str:
    """What the first page and the README begin with."""
    side = "more" if line.mean > 0 else "less"
    points = f"{abs(line.mean):.1f} percentage points {side}"
    interval = f"{line.low:+.1f} to {line.high:+.1f}".replace("-", "−")
    return (
        f"**On {line.what}, R-LoRA scores {points} than a plain LoRA of the same size** "
        f"(95 % interval {interval}, {line.seeds} seeds: {line.verdict})"
    )


def numbers(lines: list[Line]) -> str:
    """All lines as text, as the picture's file holds them."""
    return " ".join(line.sentence() for line in lines)


def draw(path: Path = PICTURE) -> None:
    """Write the picture to `path`, the same text each time."""
    lines = main_lines()
    with book_style(), plt.rc_context({"svg.fonttype": "none"}):  # text stays text
        figure = overview_plot(lines)
        figure.set_size_inches(WIDTH, 1.2 + 0.5 * len(lines))
        (ax,) = figure.axes
        names = [textwrap.fill(f"{line.what} ({line.seeds} seeds)", 18) for line in lines]
        ax.set_yticks(range(len(lines)), names)
        ax.set_xlabel("R-LoRA less LoRA,\npercentage points, 95 % interval")
        metadata = {"Date": None, "Creator": None, "Description": numbers(lines)}
        figure.savefig(path, format="svg", metadata=metadata)
        plt.close(figure)


if __name__ == "__main__":
    draw()
    print(f"{PICTURE.name}: {numbers(main_lines())}\n\n{sentence(main_lines()[0])}")
