"""The book as a whole: one address, one table of contents, and pages that stand alone."""

import itertools
import re
import struct
from functools import cached_property
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from bs4 import BeautifulSoup
from chapter_code import CHAPTERS
from project import CONFIG, EXTRAS, PAGES, PINS, PROJECT, ROOT, URL, named
from sphinxcontrib import katex


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
    asked = itertools.chain(PROJECT["dependencies"], *EXTRAS.values())
    assert {*named(asked)} <= {name.replace("_", "-").lower() for name in PINS}


class Page(BeautifulSoup):
    """A built page, and where it lies."""

    def __init__(self, path: Path):
        super().__init__(path.read_bytes(), "html.parser")
        self.path = path

    def at(self, address: str) -> Path:
        """The file that an address on this page leads to."""
        place = unquote(urlsplit(address).path)
        return (self.path.parent / place).resolve() if place else self.path

    @cached_property
    def ids(self) -> set[str]:
        return {tag["id"] for tag in self.find_all(id=True)}

    def meta(self) -> dict[str, str]:
        tags = self.find_all("meta", content=True)
        return {tag.get("property") or tag.get("name"): tag["content"] for tag in tags}

    def loads(self) -> list[str]:
        """What it loads; an <a> only names where a reader may go."""
        tags = self.select("[src], link[href]:not([rel=canonical])")
        return [tag.get("src") or tag.get("href") for tag in tags]


@pytest.fixture(scope="module")
def site(built) -> dict[str, Page]:
    """The pages of a strict build, by their address in the site."""
    root = built.root
    return {p.relative_to(root).as_posix(): Page(p) for p in sorted(root.rglob("*.html"))}


def foreign(page: Page) -> list[str]:
    """What a page would fetch from another host."""
    return [address for address in page.loads() if urlsplit(address).netloc]


def dead(site: dict[str, Page], page: Page) -> list[str]:
    """The links of a page into the site that lead nowhere."""
    pages, found = {page.path: page for page in site.values()}, []
    for link in (tag["href"] for tag in page.select("a[href]")):
        parts, target = urlsplit(link), page.at(link)
        if parts.scheme or parts.netloc:
            continue
        known = pages.get(target)
        if not target.is_file() or (parts.fragment and known and parts.fragment not in known.ids):
            found.append(link)
    return found


def test_the_strict_build_has_every_page(site):
    assert {f"{page}.html" for page in PAGES} <= set(site)


def test_no_page_fetches_from_another_host(site):
    for name, page in site.items():
        assert foreign(page) == [], name
        assert not re.search(r"unpkg\.com|jsdelivr|cdnjs|googleapis", page.path.read_text()), name


def test_mathematics_has_what_draws_it(site):
    formulas = {name: len(page.select(".math")) for name, page in site.items()}
    assert all(formulas[f"book/{path.stem}.html"] > 10 for path in CHAPTERS)
    for page in (page for name, page in site.items() if formulas[name]):
        for needed in ("katex.min.js", "katex_autorenderer.js", "katex/katex.min.css"):
            assert any(needed in load and page.at(load).is_file() for load in page.loads())


def test_every_picture_has_alt_text(site):
    for name, page in site.items():
        assert [i for i in page.select("img") if not i.get("alt", "").strip()] == [], name


def test_next_and_previous_go_through_the_whole_book_but_for_the_translation(site):
    pages = [page for page in PAGES if not page.endswith(".ja")]
    (translation,) = set(PAGES) - set(pages)
    steps = {"left-prev": [None, *pages[:-1]], "right-next": [*pages[1:], None]}
    for way, targets in steps.items():
        for name, target in zip([*pages, translation], [*targets, None], strict=True):
            page = site[f"{name}.html"]
            links = [page.at(link["href"]) for link in page.select(f"a.{way}")]
            assert links == ([site[f"{target}.html"].path] if target else []), name


def test_the_references_keep_the_capitals_of_names(site):
    """The style lowers the words of a title; names are in braces."""
    shown = re.sub(r"\s+", " ", site["book/references.html"].path.read_text())
    bibliography = (ROOT / "book" / "references.bib").read_text()
    titles = re.findall(r"^ *title *= *\{(.*?)\},$", bibliography, re.M | re.S)
    names = re.findall(r"\{(.*?)\}", " ".join(titles))
    assert len(names) > 30 and [name for name in names if name not in shown] == []
    rest = re.sub(r"\{.*?\}", "", " ".join(titles))
    assert re.findall(r"\b[\w]*[a-z][A-Z]\w*|\b[A-Z]{2,}\b", rest) == []


def test_no_link_into_the_site_is_dead(site):
    for name, page in site.items():
        assert dead(site, page) == [], name


def test_the_site_is_light_and_built_quickly(built, site):
    """A page's own weight: its HTML and its pictures; what all pages share comes once."""
    assert built.seconds < 60
    for name, page in site.items():
        pictures = {page.at(img["src"]) for img in page.select("img")}
        assert sum(path.stat().st_size for path in [page.path, *pictures]) < 1e6, name


def test_no_notebook_is_heavy():
    assert [path.name for path in CHAPTERS if path.stat().st_size > 1.5e6] == []


def address() -> str:
    """Where the site stands: `html.baseurl`, else where GitHub Pages publishes the repository."""
    owner, name = urlsplit(URL).path.split("/")[1:3]
    return CONFIG["html"].get("baseurl") or f"https://{owner}.github.io/{name}/"


def test_the_sitemap_has_every_page(built):
    listed = re.findall("<loc>(.*?)</loc>", (built.root / "sitemap.xml").read_text())
    assert listed == sorted(f"{address()}{page}.html" for page in PAGES)


def test_every_page_has_a_link_preview(built, site):
    for page in PAGES:
        tags = site[f"{page}.html"].meta()
        assert tags["og:url"] == f"{address()}{page}.html"
        assert 3 < len(tags["og:title"]) < 80
        assert 40 < len(tags["og:description"]) <= 200, page
        assert not re.search(r"[$\\{]|not set", tags["og:title"] + tags["og:description"]), page
        assert tags["description"] == tags["og:description"]
        picture = built.root / tags["og:image"].removeprefix(address())
        assert picture.stat().st_size < 300_000
        width, height = struct.unpack(">II", picture.read_bytes()[16:24])  # of a PNG
        assert (str(width), str(height)) == (tags["og:image:width"], tags["og:image:height"])
    assert len({site[f"{page}.html"].meta()["og:description"] for page in PAGES}) == len(PAGES)


def test_every_page_says_its_language_and_licence(site):
    for name in PAGES:
        page = site[f"{name}.html"]
        assert page.html["lang"] == ("ja" if name.endswith(".ja") else "en")
        assert "CC-BY-4.0. Code: MIT" in page.text


def test_the_404_page_starts_at_the_root_of_the_site(site):
    first = site["404.html"].select("base, [src], [href]")[0]
    assert (first.name, first["href"]) == ("base", urlsplit(address()).path)
    assert not site["index.html"].select("base")


def test_a_foreign_script_and_a_dead_link_are_seen(tmp_path):
    path = tmp_path / "page.html"
    path.write_text(
        '<script src="https://example.org/a.js"></script>'
        '<a href="gone.html">x</a><a href="#gone">y</a><a id="here" href="#here">z</a>'
    )
    page = Page(path)
    assert foreign(page) == ["https://example.org/a.js"]
    assert dead({"page.html": page}, page) == ["gone.html", "#gone"]
