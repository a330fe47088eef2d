"""Names at the ends of lines: each at its line's height, and none on another."""

import matplotlib.pyplot as plt
import pytest

from rlora_lab.drawing.labels import label_ends


@pytest.fixture
def ax():
    fig, ax = plt.subplots(figsize=(4, 2), layout="constrained")
    yield ax
    plt.close(fig)


def boxes(ax):
    ax.figure.draw_without_rendering()
    return {text.get_text(): text.get_window_extent() for text in ax.texts}


def test_names_stand_where_lines_end_in_their_colours(ax):
    ax.plot(["a", "b"], [0.0, 1.0], label="high", color="tab:red")
    ax.plot(["a", "b"], [1.0, 0.0], label="low")
    ax.plot(["a", "b"], [0.5, 0.5])  # has no name
    label_ends(ax)
    found = boxes(ax)
    assert found.keys() == {"high", "low"}
    for name, y in {"high": 1.0, "low": 0.0}.items():
        middle = (found[name].y0 + found[name].y1) / 2
        assert middle == pytest.approx(ax.transData.transform((1, y))[1], abs=6)
        assert found[name].x0 > ax.transAxes.transform((1, 0))[0]
    assert ax.texts[0].get_color() != ax.texts[1].get_color()


@pytest.mark.parametrize("end", [0.0, 0.5, 1.0])
def test_names_that_would_touch_are_moved_apart_in_their_order(ax, end):
    for i in range(4):
        ax.plot([0, 1], [0.5, end + i / 1000], label=str(i))
    ax.set_ylim(0, 1)
    label_ends(ax)
    found = boxes(ax)
    for low, high in zip("012", "123", strict=True):
        assert found[high].y0 >= found[low].y1


def test_axes_without_named_lines_get_no_names(ax):
    ax.plot([0, 1], [0, 1])
    label_ends(ax)
    assert not ax.texts
