// A box that scrolls sideways can be reached by the keyboard: it gets a tab stop while it is too
// wide for the window, and loses it when it fits again.
"use strict";
{
  const boxes =
    ".bd-article :is(pre, div.math, .cell_output, .output, .pst-scrollable-table-container)";
  const update = () => {
    for (const box of document.querySelectorAll(boxes)) {
      const wide = box.scrollWidth > box.clientWidth;
      const scrolls = wide && getComputedStyle(box).overflowX !== "visible";
      if (scrolls) box.tabIndex = 0;
      else box.removeAttribute("tabindex");
    }
  };
  window.addEventListener("load", update);
  window.addEventListener("resize", update);
  document.addEventListener("toggle", update, true); // a solution was unfolded
}
