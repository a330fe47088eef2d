"""The book as a whole: one address, one table of contents, and pages that stand alone."""

import html.parser
import itertools
import re
import struct
from pathlib import Path
from urllib.parse import unquote, urlsplit
from xml.etree import ElementTree

import pytest
from chapter_code import CHAPTERS
from project import CONFIG, PAGES, PINS, PROJECT, ROOT, URL
from sphinxcontrib import katex

# These load something into a page; an <a> only names where a reader may go.
LOADING = {"img": "src", "script": "src", "iframe": "src", "source": "src", "link": "href"}


def test_every_chapter_is_in_the_contents_and_on_the_landing_page():
    listed = [page for page in PAGES if re.match(r"book/\d\d\w?_", page)]
    assert listed == [f"book/{path.stem}" for path in CHAPTERS]
    index = (ROOT / "index.md").read_text()
    assert [page for page in listed if f"]({page}.ipynb)" not in index] == []


def test_katex_and_its_style_sheet_are_one_version():
    style = (ROOT / "book/_static/katex/katex.min.css").read_text()
    assert f'content:"{katex.katex_version}"' in style
    fonts = re.findall(r"url\((fonts/[\w-]+\.woff2)\)", style)
    assert fonts and all((ROOT / "book/_static/katex" / font).is_file() for font in fonts)


def test_the_distribution_asks_for_torch_and_peft_without_upper_bounds():
    assert PROJECT["dependencies"] == ["torch", "peft>=0.21"]


def test_the_constraints_are_exact_and_for_any_machine():
    assert PINS["torch"] == "2.13.0"
    assert all(re.fullmatch(r"[\w.]+", version) for version in PINS.values())
    named = {re.match(r"[\w-]+", r)[0] for r in PROJECT["dependencies"]}
    for extra in PROJECT["optional-dependencies"].values():
        named |= {re.match(r"[\w-]+", requirement)[0] for requirement in extra}
    assert named - {name.replace("_", "-").lower() for name in PINS} == set()


class Page(html.parser.HTMLParser):
    """What one built page loads, shows and links to."""

    def __init__(self, path: Path):
        super().__init__()
        self.path, self.loads, self.images, self.links, self.ids = path, [], [], [], set()
        self.tags, self.steps = {}, {}
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs[key] for key in ("id", "name") if attrs.get(key)}
        if attrs.get(LOADING.get(tag, "")) and attrs.get("rel") != "canonical":
            self.loads.append(attrs[LOADING[tag]])
        if tag == "meta" and "content" in attrs:
            self.tags[attrs.get("property") or attrs.get("name")] = attrs["content"]
        if tag == "img":
            self.images.append(attrs)
        if tag == "a" and attrs.get("href"):
            self.links.append(attrs["href"])
            self.steps[attrs.get("class")] = attrs["href"]


@pytest.fixture(scope="module")
def site(built) -> dict[str, Page]:
    """The pages of a strict build, by their address in the site."""
    root = built.root
    return {p.relative_to(root).as_posix(): Page(p) for p in sorted(root.rglob("*.html"))}


def foreign(page: Page) -> list[str]:
    """What a page would fetch from another host."""
    return [address for address in page.loads if urlsplit(address).netloc]


def dead(site: dict[str, Page], name: str) -> list[str]:
    """The links of a page into the site that lead nowhere."""
    page, found = site[name], []
    for link in page.links:
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            continue
        target = (page.path.parent / unquote(parts.path)).resolve() if parts.path else page.path
        known = next((p for p in site.values() if p.path == target), None)
        if not target.is_file() or (parts.fragment and known and parts.fragment not in known.ids):
            found.append(link)
    return found


def test_the_strict_build_has_every_page(site):
    assert {f"{page}.html" for page in PAGES} <= set(site)


def test_no_page_fetches_from_another_host(site):
    assert {name: foreign(page) for name, page in site.items() if foreign(page)} == {}
    text = "".join(page.path.read_text() for page in site.values())
    assert not re.search(r"unpkg\.com|jsdelivr|cdnjs|googleapis", text)


def test_mathematics_has_what_draws_it(site):
    formulas = {name: page.path.read_text().count('class="math') for name, page in site.items()}
    assert all(formulas[f"book/{path.stem}.html"] > 10 for path in CHAPTERS)
    for page in (page for name, page in site.items() if formulas[name]):
        for needed in ("katex.min.js", "katex_autorenderer.js", "katex/katex.min.css"):
            found = [load for load in page.loads if needed in load]
            assert found and (page.path.parent / urlsplit(found[0]).path).resolve().is_file()


def test_every_picture_has_alt_text(site):
    for name, page in site.items():
        assert [i for i in page.images if not i.get("alt", "").strip()] == [], name


def test_next_and_previous_go_through_the_whole_book_but_for_the_translation(site):
    pages = [page for page in PAGES if not page.endswith(".ja")]
    for before, after in itertools.pairwise(pages):
        one, two = site[f"{before}.html"], site[f"{after}.html"]
        assert (one.path.parent / one.steps["right-next"]).resolve() == two.path
        assert (two.path.parent / two.steps["left-prev"]).resolve() == one.path
    assert "left-prev" not in site[f"{pages[0]}.html"].steps
    assert "right-next" not in site[f"{pages[-1]}.html"].steps
    (translation,) = set(PAGES) - set(pages)
    assert not {"left-prev", "right-next"} & set(site[f"{translation}.html"].steps)


def test_the_references_keep_the_capitals_of_names(site):
    """The style lowers the words of a title; names are in braces."""
    shown = re.sub(r"\s+", " ", site["book/references.html"].path.read_text())
    bibliography = (ROOT / "book" / "references.bib").read_text()
    titles = re.findall(r"^ *title *= *\{(.*?)\},$", bibliography, re.M | re.S)
    names = re.findall(r"\{(.*?)\}", " ".join(titles))
    assert len(names) > 30 and [name for name in names if name not in shown] == []
    bare = re.findall(
        r"\b[\w]*[a-z][A-Z]\w*|\b[A-Z]{2,}\b", re.sub(r"\{.*?\}", "", " ".join(titles))
    )
    assert bare == []


def test_no_link_into_the_site_is_dead(site):
    assert {name: dead(site, name) for name in site if dead(site, name)} == {}


def test_the_site_is_light_and_built_quickly(built, site):
    """A page's own weight: its HTML and its pictures; what all pages share comes once."""
    assert built.seconds < 60
    for name, page in site.items():
        pictures = {(page.path.parent / unquote(i["src"])).resolve() for i in page.images}
        weight = sum(path.stat().st_size for path in [page.path, *pictures])
        assert weight < 1e6, f"{name} weighs {weight / 1e6:.2f} MB"


def test_no_notebook_is_heavy():
    heavy = {p.name: p.stat().st_size for p in CHAPTERS if p.stat().st_size > 1.5e6}
    assert heavy == {}


def address() -> str:
    """Where the site stands: `html.baseurl`, else where GitHub Pages publishes the repository."""
    owner, name = urlsplit(URL).path.split("/")[1:3]
    return CONFIG["html"].get("baseurl") or f"https://{owner}.github.io/{name}/"


def test_the_sitemap_has_every_page(built):
    tree = ElementTree.parse(built.root / "sitemap.xml")
    listed = [
        element.text for element in tree.iter("{http://www.sitemaps.org/schemas/sitemap/0.9}loc")
    ]
    assert listed == sorted(f"{address()}{page}.html" for page in PAGES)


def test_every_page_has_a_link_preview(built, site):
    for page in PAGES:
        tags = site[f"{page}.html"].tags
        assert tags["og:url"] == f"{address()}{page}.html"
        assert 3 < len(tags["og:title"]) < 80
        assert 40 < len(tags["og:description"]) <= 200, page
        assert not re.search(r"[$\\{]|not set", tags["og:title"] + tags["og:description"]), page
        assert tags["description"] == tags["og:description"]
        picture = built.root / tags["og:image"].removeprefix(address())
        assert picture.stat().st_size < 300_000
        width, height = struct.unpack(">II", picture.read_bytes()[16:24])  # of a PNG
        assert (str(width), str(height)) == (tags["og:image:width"], tags["og:image:height"])
    assert len({site[f"{page}.html"].tags["og:description"] for page in PAGES}) == len(PAGES)


def test_every_page_says_its_language(site):
    for page in PAGES:
        language = "ja" if page.endswith(".ja") else "en"
        assert f'<html lang="{language}"' in site[f"{page}.html"].path.read_text()


def test_the_404_page_starts_at_the_root_of_the_site(site):
    text = site["404.html"].path.read_text()
    base = f'<base href="{urlsplit(address()).path}">'
    assert base in text and text.index(base) < min(map(text.index, ('href="_static', 'src="')))
    assert "<base" not in site["index.html"].path.read_text()


def test_every_page_says_under_which_licence_it_stands(site):
    for page in PAGES:
        assert "CC-BY-4.0. Code: MIT" in site[f"{page}.html"].path.read_text()


def test_a_foreign_script_and_a_dead_link_are_seen(tmp_path):
    path = tmp_path / "page.html"
    path.write_text(
        '<script src="https://example.org/a.js"></script><img src="b.png">'
        '<a href="gone.html">x</a><a href="#gone">y</a><a id="here" href="#here">z</a>'
    )
    site = {"page.html": Page(path)}
    assert foreign(site["page.html"]) == ["https://example.org/a.js"]
    assert dead(site, "page.html") == ["gone.html", "#gone"]
    assert not site["page.html"].images[0].get("alt")
