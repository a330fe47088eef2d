"""What the site has beside its chapters, as a Sphinx extension.

The `runs` directive tabulates the stamps of the notebooks, and the `minutes` role says how long one
takes to read; every page gets a description and a link preview; the search finds sections;
`404.html` and `sitemap.xml` are written. The address of the site, which previews, sitemap
and 404 page need, is `html.baseurl` of `_config.yml`, and where that is not set, the one at which
GitHub Pages publishes `repository.url`.
"""

import json
import re
import sys
from html import escape
from pathlib import Path
from urllib.parse import urlsplit

from docutils import nodes
from docutils.utils import new_document
from sphinx.builders.html import StandaloneHTMLBuilder
from sphinx.util.docutils import SphinxDirective, SphinxRole

sys.path.insert(0, str(Path(__file__).parents[1]))
from reading import read_minutes  # noqa: E402

STAMP = "rlora_book"  # as book/execute.py writes it into a notebook's metadata
COLUMNS = ["date", "seconds", "python", "torch", "peft", "transformers", "machine"]
PREVIEW = "_static/preview.png"  # 1200 x 630, what previews are cut to
NOT_FOUND = """
<h1>There is no such page</h1>
<p>It may have moved when a chapter was renamed. Look for it in the contents, by the
<a href="search.html">search</a>, or from the <a href="index.html">first page</a>.</p>
"""
# The site may also stand at the root of a host, as `make serve` has it (there: /404.html).
AT_HOME = """<script>
if (!location.pathname.startsWith({})) document.querySelector("base").href = "/";
</script>
"""


class Runs(SphinxDirective):
    """A table of when, where and with which versions each notebook of the book last ran."""

    def run(self) -> list[nodes.Node]:
        names = ["chapter", *COLUMNS]
        lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
        stamps = []
        for page in sorted(self.env.found_docs):
            path = Path(self.env.doc2path(page))
            if path.suffix != ".ipynb":
                continue
            self.env.note_dependency(str(path))
            stamp = json.loads(path.read_text())["metadata"].get(STAMP, {})
            if missing := [name for name in COLUMNS if name not in stamp]:
                raise self.error(f"{path.name} has no {missing} in its stamp: make execute")
            stamps.append(stamp)
            cells = [f"[](/{page}.ipynb)", *(str(stamp[name]) for name in COLUMNS)]
            lines.append("| " + " | ".join(cells) + " |")
        dates = sorted({stamp["date"] for stamp in stamps})
        minutes = sum(stamp["seconds"] for stamp in stamps) / 60
        days = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
        total = f"{len(stamps)} notebooks, {minutes:.1f} minutes together, run {days}."
        table = self.parse_text_to_nodes("\n".join([total, "", *lines]))
        return [nodes.container("", *table, classes=["runs"])]


class Minutes(SphinxRole):
    """The minutes that a notebook beside the page takes to read, by the rule of `reading.py`."""

    def run(self) -> tuple[list[nodes.Node], list]:
        path = Path(self.env.srcdir, "book", f"{self.text}.ipynb")
        self.env.note_dependency(str(path))
        return [nodes.Text(str(round(read_minutes(path))))], []


# What is no part of a page's own words: formulas, folded cells, outputs, raw HTML, sections below.
NOT_WORDS = (nodes.math, nodes.math_block, nodes.raw, nodes.comment, nodes.section)
NOT_WORDS_CLASSES = {"tag_hide-cell", "cell_output"}


class SiteBuilder(StandaloneHTMLBuilder):
    """Sphinx's HTML, with a search index of sections: each is a document `page#anchor` of it."""

    def index_page(self, pagename: str, doctree: nodes.document, title: str) -> None:
        top = next(doctree.findall(nodes.section), None)
        if self.indexer is None or top is None:
            return
        for section in doctree.findall(nodes.section):
            name = pagename if section is top else f"{pagename}#{section['ids'][0]}"
            words = new_document("")
            words += section.deepcopy()
            copy = words.children[0]
            copy["ids"] = []
            for node in list(copy.findall(nodes.Element)):
                folded = NOT_WORDS_CLASSES & set(node.get("classes", []))
                if node is not copy and (folded or isinstance(node, NOT_WORDS)):
                    node.parent.remove(node)
            heading = next(copy.findall(nodes.title)).astext()
            filename = self.env.doc2path(pagename, base=False)
            self.indexer.feed(name, filename, heading, words)

    def dump_search_index(self) -> None:
        self.indexer.prune = lambda pages: None  # it would drop all that is no page
        super().dump_search_index()


STOPS = re.compile(r"[.,;:!?)\]’”]+")


def keep_stops(app, doctree: nodes.document, page: str) -> None:
    """Binds a formula and the stop after it, so that no line begins with the stop."""
    for formula in list(doctree.findall(nodes.math)):
        after = formula.next_node(descend=False, siblings=True)
        stop = STOPS.match(after.astext()) if isinstance(after, nodes.Text) else None
        if stop:
            together = nodes.inline("", "", classes=["nobreak"])
            formula.replace_self(together)
            together += [formula, nodes.Text(stop[0])]
            after.parent.replace(after, nodes.Text(after.astext()[stop.end() :]))


def skip_translation(app, page: str, context: dict) -> None:
    """Previous and next go round the Japanese page, which is a translation of its neighbour."""
    relations = app.builder.relations
    if page.endswith(".ja"):
        context["prev"] = context["next"] = None
        return
    for name, step in (("prev", 1), ("next", 2)):
        other = relations.get(page, [None] * 3)[step]
        if other and other.endswith(".ja"):
            other = relations[other][step]
            title = app.builder.render_partial(app.env.titles[other])["title"]
            context[name] = {"link": app.builder.get_relative_uri(page, other), "title": title}


def configure(app, config) -> None:
    """Fills in Sphinx's own `html_baseurl`, from which it also makes canonical links."""
    if not config.html_baseurl:
        owner, name = urlsplit(config.html_theme_options["repository_url"]).path.split("/")[1:3]
        config.html_baseurl = f"https://{owner}.github.io/{name}/"
    config.html_baseurl = config.html_baseurl.rstrip("/") + "/"
    # Its own pictures need the room that the list of a page's sections takes.
    contents = {"**": ["page-toc"], config.root_doc: []}
    config.html_theme_options["secondary_sidebar_items"] = contents


def add_tags(app, page, template, context, doctree) -> None:
    """Language, description and link preview of a page, from its title and first paragraph."""
    base = app.config.html_baseurl
    if page.endswith(".ja"):  # a browser takes Japanese glyphs, and a reader's voice its own
        context["language"] = "ja"
    if page == "404":  # shown for any address, so its relative links start at the site's root
        root = urlsplit(base).path
        context["metatags"] += f'<base href="{escape(root)}">\n' + AT_HOME.format(json.dumps(root))
    skip_translation(app, page, context)
    if doctree is None:
        return
    # docutils calls citations a list, of entries that are no list items: a screen reader stumbles.
    context["body"] = context["body"].replace(
        'role="list" class="citation-list"', 'class="citation-list"'
    )
    first = next(iter(doctree.findall(nodes.paragraph)), None)
    text = first.astext() if first else app.config.project
    text = " ".join(re.sub(r"\\([a-zA-Z]*)|[{}$]", r" \1", text).split())  # formulas as words
    text = text if len(text) <= 200 else text[:199].rsplit(" ", 1)[0] + " …"
    title = next(iter(doctree.findall(nodes.title))).astext()
    tags = {
        "og:title": title,
        "og:description": text,
        "og:type": "website" if page == app.config.root_doc else "article",
        "og:site_name": app.config.project,
        "og:url": base + app.builder.get_target_uri(page),
        "og:image": base + PREVIEW,
        "og:image:width": "1200",
        "og:image:height": "630",
        "og:image:alt": "The R-LoRA layer: one A, several heads, a router.",
    }
    context["metatags"] += f'<meta name="description" content="{escape(text)}">\n'
    context["metatags"] += '<meta name="twitter:card" content="summary_large_image">\n'
    for name, content in tags.items():
        context["metatags"] += f'<meta property="{name}" content="{escape(content)}">\n'


def not_found(app):
    """The page that GitHub Pages shows for an address that it does not have."""
    yield "404", {"title": "Page not found", "body": NOT_FOUND, "metatags": ""}, "page.html"


def write_sitemap(app, exception) -> None:
    """`sitemap.xml` with every page of the contents."""
    if exception or app.builder.name != "html":
        return
    pages = sorted(app.env.found_docs)
    places = [escape(app.config.html_baseurl + app.builder.get_target_uri(p)) for p in pages]
    urls = "".join(f"  <url><loc>{place}</loc></url>\n" for place in places)
    Path(app.outdir, "sitemap.xml").write_text(
        '<?xml version="1.0" encoding="utf-8"?>\n'
        f'<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">\n{urls}</urlset>\n'
    )


def setup(app) -> dict[str, bool]:
    app.add_builder(SiteBuilder, override=True)
    app.add_directive("runs", Runs)
    app.add_role("minutes", Minutes())
    app.connect("doctree-resolved", keep_stops)
    app.connect("config-inited", configure)
    app.connect("html-page-context", add_tags)
    app.connect("html-collect-pages", not_found)
    app.connect("build-finished", write_sitemap)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
