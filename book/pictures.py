"""Draw the forest plot of the landing page and the README from the records.

    python book/pictures.py

It writes `_static/evidence.svg`: what other methods got right more than R-LoRA on ten string tasks,
as chapter 08 draws it, for a phone's width. The numbers stand in the file as well, and a test holds
them to the records: where the records have changed, draw it again.
"""

from pathlib import Path

import matplotlib.pyplot as plt

from rlora_lab.drawing.style import book_style
from rlora_lab.report.loading import load_evidence
from rlora_lab.report.pictures import forest
from rlora_lab.report.questions import Contrast, against_rlora

PICTURE = Path(__file__).resolve().parent / "_static" / "evidence.svg"
METHODS = ("one-head", "lora", "hydralora", "mlora", "lora-rank")
TITLE = "Ten string tasks: more letters\nright than R-LoRA, or fewer"
AXIS = "← R-LoRA better · other better →\npercentage points, 95 % interval"
WIDTH = 3.6  # inches: type of 9 points is 12 pixels on a screen of 390


def contrasts() -> list[Contrast]:
    """Each method of METHODS less R-LoRA, best first, corrected for all that were compared."""
    found = [c for c in against_rlora(load_evidence("synthetic", say=False)) if c.name in METHODS]
    return sorted(found, key=lambda c: -c.mean)


def numbers(found: list[Contrast]) -> str:
    """The contrasts as text, as the picture's file holds them."""
    return "; ".join(f"{c.name} {c.mean:+.1f} ({c.low:+.1f} to {c.high:+.1f})" for c in found)


def draw(path: Path = PICTURE) -> None:
    """Write the picture to `path`, the same text each time."""
    found = contrasts()
    with book_style(), plt.rc_context({"svg.fonttype": "none"}):  # text stays text
        figure = forest(found, TITLE, AXIS)
        figure.set_size_inches(WIDTH, 3.4)
        figure.axes[0].title.set_fontsize(10)
        metadata = {"Date": None, "Creator": None, "Description": numbers(found)}
        figure.savefig(path, format="svg", metadata=metadata)
        plt.close(figure)


if __name__ == "__main__":
    draw()
    print(f"{PICTURE.name}: {numbers(contrasts())}")
