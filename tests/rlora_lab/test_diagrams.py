"""The running diagram: SVG on a white ground, the same each time, and growing."""

import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import matplotlib.pyplot as plt
import pytest

from rlora_lab.drawing import diagrams
from rlora_lab.drawing.style import use_book_style

STAGES = {
    "full_update": diagrams.full_update,
    "lora_layer": diagrams.lora_layer,
    "lora_for_tasks": diagrams.lora_for_tasks,
    "heads": diagrams.heads_layer,
    "heads and side pair": lambda: diagrams.heads_layer(side_pair=True),
    "all": lambda: diagrams.heads_layer(side_pair=True, masks=True),
}
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(autouse=True)
def style():
    use_book_style()
    yield
    plt.rcdefaults()


def shapes(drawn) -> int:
    return len(list(ElementTree.fromstring(drawn.data).iter(f"{SVG}path")))


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_svg_on_a_white_ground(stage):
    drawn = STAGES[stage]()
    root = ElementTree.fromstring(drawn.data)
    assert root.tag == f"{SVG}svg"
    width, height = (float(root.get(side).removesuffix("pt")) for side in ("width", "height"))
    ground = next(root.iter(f"{SVG}path"))  # the first thing drawn: all of it, in white
    assert "#ffffff" in ground.get("style").lower()
    corners = {float(number) for number in ground.get("d").split() if number[0].isdigit()}
    assert corners == {0, width, height}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_the_same_text_each_time(stage):
    # Otherwise each execution of a chapter would change its file.
    first = STAGES[stage]().data
    plt.figure()  # what else is drawn makes no difference
    assert STAGES[stage]().data == first
    assert "<dc:date>" not in first


def test_drawing_leaves_pyplot_alone():
    # Settings that a notebook's backend makes while it loads must not be taken back.
    code = (
        "import matplotlib; from rlora_lab.drawing.diagrams import lora_layer; lora_layer();"
        "print(matplotlib.get_backend(auto_select=False))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "None"


def test_the_diagram_grows():
    heads, pair, whole = (shapes(STAGES[s]()) for s in ("heads", "heads and side pair", "all"))
    assert shapes(STAGES["lora_layer"]()) < heads < pair < whole
