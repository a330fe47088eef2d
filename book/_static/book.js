// What a page does once it stands: equations break, what still is too wide shows that it scrolls
// and has a tab stop, pictures are enlarged by a tap, and print shows what is folded.
"use strict";
{
  const all = (selector) => [...document.querySelectorAll(`.bd-article ${selector}`)];
  const isWide = (box) => box.scrollWidth > box.clientWidth + 1;

  // An equation of several parts with wide spaces between them: a line to each.
  function breakEquations() {
    const options = { displayMode: true, throwOnError: false };
    for (const box of all("div.math").filter(isWide)) {
      const tex = box.querySelector("annotation")?.textContent ?? "";
      if (tex.includes("{aligned}")) continue; // it has its own lines
      for (const space of [/\\qquad/, /\\q?quad/]) {
        const lines = tex.split(space).join("\\\\[0.3em]");
        if (isWide(box)) katex.render(`\\begin{gathered}${lines}\\end{gathered}`, box, options);
      }
    }
  }

  // A formula that is bound to the stop after it may still break between its parts.
  function loosenFormulas() {
    for (const part of all(".nobreak .base + .base")) part.before(document.createElement("wbr"));
  }

  const boxes = ":is(pre, div.math, .cell_output, .output, .pst-scrollable-table-container)";
  function showScrolling() {
    for (const box of all(boxes)) {
      const scrolls = isWide(box) && getComputedStyle(box).overflowX !== "visible";
      box.classList.toggle("scrolls", scrolls);
      if (scrolls) box.tabIndex = 0;
      else box.removeAttribute("tabindex");
    }
  }
  function showEnd({ target }) {
    if (!target.classList?.contains("scrolls")) return;
    const left = target.scrollWidth - target.clientWidth - target.scrollLeft;
    target.classList.toggle("end", left < 2);
  }

  // A number, or an interval such as "-6.0 (-10.1 to -1.9) *".
  const number = /^[–—]$|^[-+−±~<>≤≥]?\s?\d[\d.,]*( ?(%|×|MB|GB|kB|ms|s|min|h))?( \(.*\))?( \*)?$/;
  const short = 24; // letters of a first column's words, or of a name in code, that stay whole
  const letters = (text) => text.replace(/[\u3000-\uffee]/g, "xx").length; // kana are wider
  function formCells() {
    for (const cell of all(":is(.table, .dataframe) :is(td, th)")) {
      const text = cell.textContent.trim();
      if (cell.tagName === "TD" && number.test(text)) cell.classList.add("number");
      else if (!cell.cellIndex && letters(text) <= short) cell.classList.add("label");
    }
    for (const code of all("table code")) {
      code.classList.toggle("whole", code.textContent.length <= short);
    }
  }

  function enlarge(picture) {
    const dialog = document.createElement("dialog");
    dialog.className = "enlarged";
    dialog.innerHTML = '<button type="button" class="btn btn-primary">Close</button>';
    dialog.append(picture.cloneNode());
    dialog.addEventListener("click", () => dialog.close());
    dialog.addEventListener("close", () => dialog.remove());
    document.body.append(dialog);
    dialog.showModal();
  }
  function enlargePictures() {
    for (const picture of all("img").filter((img) => !img.closest("a"))) {
      const button = document.createElement("button");
      button.type = "button";
      button.className = "enlarge";
      button.title = "Enlarge";
      picture.replaceWith(button);
      button.append(picture);
      button.addEventListener("click", () => enlarge(picture));
    }
  }

  let opened = [];
  function unfold() {
    opened = all("details:not([open])");
    for (const details of opened) details.open = true;
  }
  function fold() {
    for (const details of opened) details.open = false;
  }

  window.addEventListener("load", async () => {
    loosenFormulas();
    formCells();
    enlargePictures();
    await document.fonts.ready; // before that, formulas have other widths
    breakEquations();
    showScrolling();
  });
  window.addEventListener("resize", () => {
    breakEquations();
    showScrolling();
  });
  document.addEventListener("toggle", showScrolling, true); // a solution was unfolded
  document.addEventListener("scroll", showEnd, true);
  window.addEventListener("beforeprint", unfold);
  window.addEventListener("afterprint", fold);
}
