"""Draw the forest plot of the first page and the README from the records, and say its first line.

    python book/pictures.py

It writes `_static/evidence.svg`: R-LoRA less LoRA of equal size in the main comparisons, as chapter
08 draws them all, for a phone's width; and `evidence.ja.svg`, the same with Japanese words. The
numbers stand in the files as well. Then it prints the sentence with which `index.md` and
`README.md` begin. A test holds all to the records: when a comparison is finished, draw again, and
put the sentence there.
"""

import textwrap
import warnings
from pathlib import Path

import matplotlib.pyplot as plt

from rlora_lab.drawing.style import book_style
from rlora_lab.report.overview import Line, overview
from rlora_lab.report.pictures import overview_plot

PICTURE = Path(__file__).resolve().parent / "_static" / "evidence.svg"
# One row each: the first of these blocks that is finished.
MAIN = (
    ("language",),
    ("language-related-again", "language-related"),
    ("strings", "synthetic"),
    ("strings-different-8", "different-8"),
    ("strings-related-8", "related-8"),
    ("sentences",),
)
JAPANESE_PICTURE = PICTURE.with_name("evidence.ja.svg")
# In the picture's order of words: a block's name, what lies at the ends of the axis, the axis.
JAPANESE = {
    "language": "SmolLM2、異なる8タスク",
    "language-related": "SmolLM2、関連する5タスク",
    "language-related-again": "SmolLM2、関連する5タスク、\n新しい乱数",
    "strings": "文字列の10タスク",
    "strings-different-8": "文字列、異なる8タスク",
    "strings-related-8": "文字列、関連する8タスク",
    "synthetic": "文字列の10タスク、\nドロップアウト0.1",
    "different-8": "文字列、異なる8タスク、\nドロップアウト0.1",
    "related-8": "文字列、関連する8タスク、\nドロップアウト0.1",
    "sentences": "MiniLM、実際の5タスク",
    "← LoRA better": "← LoRAが優位",
    "R-LoRA better →": "R-LoRAが優位 →",
    "axis": "R-LoRAから同サイズのLoRAを引いた差、\nパーセントポイント、95％信頼区間",
}
WIDTH = 3.5  # inches: type of 9 points is 12 pixels on a screen of 390


def main_lines() -> list[Line]:
    """The main comparisons that are finished, the first of them the one that the sentence tells."""
    lines = {line.block: line for line in overview()[0]}
    finished = [[lines[block] for block in blocks if block in lines] for blocks in MAIN]
    return [found[0] for found in finished if found]


def sentence(line: Line) -> str:
    """What the first page and the README begin with."""
    mean, low, high = (f"{x:+.1f}".replace("-", "−") for x in (line.mean, line.low, line.high))
    measured = f"95\u00a0% interval {low} to {high}, {line.seeds} seeds: {line.verdict}"
    if line.verdict == "equivalent":
        return (
            f"**On {line.what}, R-LoRA scores what a plain LoRA of the same size does** "
            f"({mean} percentage points, {measured})"
        )
    side = "more" if line.mean > 0 else "less"
    return (
        f"**On {line.what}, R-LoRA scores {abs(line.mean):.1f} percentage points {side} than a "
        f"plain LoRA of the same size** ({measured})"
    )


def numbers(lines: list[Line]) -> str:
    """All lines as text, as the picture's file holds them."""
    return " ".join(line.sentence() for line in lines)


def draw(path: Path = PICTURE, words: dict[str, str] | None = None) -> None:
    """Write the picture to `path`, the same text each time; `words` are those of another language,
    as JAPANESE."""
    lines = main_lines()
    with book_style(), plt.rc_context({"svg.fonttype": "none"}):  # text stays text
        figure = overview_plot(lines)
        figure.set_size_inches(WIDTH, 1.2 + 0.5 * len(lines))
        (ax,) = figure.axes
        if words:
            names = [f"{words[line.block]}\n（{line.seeds}シード）" for line in lines]
            ax.set_xlabel(words["axis"])
            for text in ax.texts:
                text.set_text(words[text.get_text()])
        else:
            names = [textwrap.fill(f"{line.what} ({line.seeds} seeds)", 18) for line in lines]
            ax.set_xlabel("R-LoRA less LoRA,\npercentage points, 95 % interval")
        ax.set_yticks(range(len(lines)), names)
        metadata = {"Date": None, "Creator": None, "Description": numbers(lines)}
        with warnings.catch_warnings():  # the reader's browser has the letters
            warnings.filterwarnings("ignore", "Glyph .* missing")
            figure.savefig(path, format="svg", metadata=metadata)
        plt.close(figure)


if __name__ == "__main__":
    draw()
    draw(JAPANESE_PICTURE, JAPANESE)
    print(f"{PICTURE.name}: {numbers(main_lines())}\n\n{sentence(main_lines()[0])}")
