// Sphinx's search over an index of sections, whose names are `page#anchor` (rlora_site.py): results
// lead to sections, and say from which page; excerpts are a section's own words, no formulas.
"use strict";
document.addEventListener("DOMContentLoaded", () => {
  if (typeof Search === "undefined") return; // a page that does not search
  // Sections that teach come before exercises, names in the code and the glossary.
  Scorer.score = ([, title, anchor, description, score]) => {
    const lesser = description || anchor.startsWith("#term-") || title.startsWith("Exercise");
    return lesser ? Math.min(score, 10) : score; // a word in a title has 15, in the text 5
  };
  const perform = Search._performSearch;
  Search._performSearch = (...query) => {
    const { docnames, titles } = Search._index;
    const best = perform(...query).slice(-30); // the last one is shown first
    return best.map(([name, title, anchor, ...rest]) => {
      const [page, section] = name.split("#");
      if (!section) return [name, title, anchor, ...rest];
      return [page, `${title} (${titles[docnames.indexOf(page)]})`, `#${section}`, ...rest];
    });
  };
  const noWords =
    "script, style, .headerlink, .math, details.hide, .cell_output, .onlyprint, .prev-next-footer";
  Search.htmlToText = (html, anchor) => {
    const page = new DOMParser().parseFromString(html, "text/html");
    const found = page.querySelector(anchor || "article section") ?? page.body;
    const section = found.tagName === "DT" ? found.nextElementSibling : found;
    for (const element of section.querySelectorAll(`${noWords}, section`)) element.remove();
    return section.textContent;
  };
});
