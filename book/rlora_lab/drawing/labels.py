"""Names that stand where lines end, in the place of a legend."""

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

LINE_HEIGHT = 1.25  # of the size of the type


def label_ends(ax: Axes) -> None:
    """Write the label of each line to the right of its last point, in the line's colour.

    Labels that would touch are moved apart. Call it when the limits of the axes are set; lines
    without a label get none.
    """
    ax.figure.draw_without_rendering()  # for the layout, and so the height
    to_axes = ax.transData + ax.transAxes.inverted()
    height = ax.get_window_extent().height * 72 / ax.figure.dpi  # points
    gap = LINE_HEIGHT * plt.rcParams["font.size"] / height
    ends = []
    for line in ax.lines:
        if not line.get_label().startswith("_"):
            last = to_axes.transform((line.get_xdata(orig=False)[-1], line.get_ydata()[-1]))
            ends.append([last[1], line])
    ends.sort(key=lambda end: end[0])
    for low, high in zip(ends, ends[1:], strict=False):
        high[0] = max(high[0], low[0] + gap)
    if ends:
        ends[-1][0] = min(ends[-1][0], 1.0)
    for high, low in zip(ends[::-1], ends[-2::-1], strict=False):
        low[0] = min(low[0], high[0] - gap)
    for y, line in ends:
        look = {"color": line.get_color(), "va": "center", "transform": ax.transAxes}
        ax.text(1.02, y, line.get_label(), **look)
