"""The running diagram, SVG on a white ground that grows; and the style, which stays where it is."""

import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import matplotlib.pyplot as plt
import pytest

from rlora_lab.drawing import diagrams
from rlora_lab.drawing.style import book_style, use_book_style

STAGES = {
    "full_update": diagrams.full_update,
    "lora_layer": diagrams.lora_layer,
    "lora_for_tasks": diagrams.lora_for_tasks,
    "heads": diagrams.heads_layer,
    "heads and side pair": lambda: diagrams.heads_layer(side_pair=True),
    "all": lambda: diagrams.heads_layer(side_pair=True, masks=True),
}
SVG = "{http://www.w3.org/2000/svg}"


def shapes(drawn) -> int:
    return len(list(ElementTree.fromstring(drawn.data).iter(f"{SVG}path")))


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_svg_on_a_white_ground_the_same_text_each_time(stage):
    first = STAGES[stage]().data
    root = ElementTree.fromstring(first)
    assert root.tag == f"{SVG}svg" and "<dc:date>" not in first
    width, height = (float(root.get(side).removesuffix("pt")) for side in ("width", "height"))
    ground = next(root.iter(f"{SVG}path"))  # the first thing drawn: all of it, in white
    assert "#ffffff" in ground.get("style").lower()
    corners = {float(number) for number in ground.get("d").split() if number[0].isdigit()}
    assert corners == {0, width, height}
    # Otherwise each execution of a chapter would change its file.
    with plt.rc_context({"font.size": 20, "mathtext.fontset": "stix", "svg.fonttype": "none"}):
        plt.figure()  # what else is set and drawn makes no difference
        assert STAGES[stage]().data == first


PAGE = 516  # points: the width of a page's text, to which a wider drawing is shrunk


@pytest.mark.parametrize("stage", STAGES)
def test_its_type_has_nine_points_on_the_page(stage):
    drawn = STAGES[stage]().data
    width = float(ElementTree.fromstring(drawn).get("width").removesuffix("pt"))
    sizes = [100 * float(size) for size in re.findall(r"scale\(([\d.]+) -", drawn)]
    assert sizes and min(sizes) * min(1, PAGE / width) >= 9


def test_the_diagram_grows():
    heads, pair, whole = (shapes(STAGES[s]()) for s in ("heads", "heads and side pair", "all"))
    assert shapes(STAGES["lora_layer"]()) < heads < pair < whole


def test_what_is_not_at_issue_is_pale():
    def pale(**options) -> int:
        return diagrams.heads_layer(side_pair=True, masks=True, **options).data.count("0.25")

    whole, masks = pale(), pale(lit=["masks"])
    assert whole < pale(lit=["masks", "heads"]) < masks
    with pytest.raises(ValueError, match="no part 'mask': there are base"):
        diagrams.heads_layer(lit=["mask"])


# The style

LEFT_ALONE = """
import matplotlib
before = matplotlib.rcParams.copy()
from rlora_lab.drawing import diagrams
from rlora_lab.drawing.style import book_style
diagrams.lora_layer()
assert matplotlib.get_backend(auto_select=False) is None  # a notebook's is still to be loaded
assert matplotlib.rcParams.copy() == before
import matplotlib.pyplot as plt
with book_style():
    plt.plot([1, 2])
    assert matplotlib.rcParams["font.size"] == 9
after = matplotlib.rcParams.copy()
assert {key for key in before if after[key] != before[key]} <= {"backend"}
"""
# In a notebook, as its cells see it and as it is between them.
IN_A_NOTEBOOK = """
import matplotlib
from IPython.terminal.interactiveshell import TerminalInteractiveShell
from rlora_lab.drawing.style import use_book_style
shell = TerminalInteractiveShell.instance()
own = {"lines.linewidth": 7, "font.size": 20}
matplotlib.rcParams.update(own)
use_book_style()
use_book_style()  # its cell was run twice
before = matplotlib.rcParams.copy()
for cell in ("import matplotlib.pyplot as plt", "plt.plot([1, 2])", "1 / 0", "plt.figure()"):
    shell.run_cell(cell)
    shell.run_cell("seen = plt.rcParams['font.size'], plt.rcParams['lines.linewidth']")
    assert shell.user_ns["seen"] == (9, 1.6)
    assert matplotlib.rcParams.copy() == before
assert before["interactive"] and {key: before[key] for key in own} == own
"""


@pytest.mark.parametrize("code", [LEFT_ALONE, IN_A_NOTEBOOK], ids=["script", "notebook"])
def test_matplotlibs_settings_are_untouched(code):
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_inside_the_style_nothing_of_ones_own_settings_is_left():
    names = "lines.linewidth", "xtick.direction"
    with plt.rc_context({"lines.linewidth": 7, "xtick.direction": "in"}):
        with book_style():
            assert [plt.rcParams[name] for name in names] == [1.6, "out"]
        assert [plt.rcParams[name] for name in names] == [7, "in"]


def test_outside_a_notebook_the_context_is_named():
    with pytest.raises(RuntimeError, match="with book_style"):
        use_book_style()
