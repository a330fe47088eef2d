"""The site as a reader has it, in a real browser: chromium from the system, driven by Playwright.

It stands below a path, as on GitHub Pages, and an address that it does not have gets its 404 page.
"""

import http.server
import itertools
import re
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from unittest.mock import ANY
from urllib.parse import urlsplit

import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from chapter_code import CHAPTERS, read
from peft import get_peft_model
from playwright.sync_api import Browser, BrowserContext, Page, Route, expect, sync_playwright
from project import CHROMIUM, PAGES, URL, needs_chromium
from torch import nn

from rlora_lab.speed.instruments import kept_bytes
from rlora_min import RLoraConfig, head_similarity

PATH = "/" + urlsplit(URL).path.split("/")[2] + "/"
MISSING = "no/such/page.html"
ALL = [*(f"{page}.html" for page in PAGES), "search.html", "genindex.html", MISSING]
# axe-core's rules are about what templates and scripts make, and it takes seconds for a chapter: of
# the chapters it looks at the one with the most tables and pictures.
FULLEST = "book/08_does_it_help.html"
WIDE, PHONE = {"width": 1280, "height": 800}, {"width": 360, "height": 740}

pytestmark = needs_chromium


class Handler(http.server.SimpleHTTPRequestHandler):
    def translate_path(self, path: str) -> str:
        path = urlsplit(path).path
        return super().translate_path("/" + path.removeprefix(PATH) if PATH in path else "/none")

    def send_error(self, code, *args) -> None:
        self.send_response(code)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(Path(self.directory, "404.html").read_bytes())

    def log_message(self, *args) -> None:
        pass


@pytest.fixture(scope="module")
def address(built) -> Iterator[str]:
    handler = partial(Handler, directory=str(built.root))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}{PATH}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-quic"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address) -> Iterator[Page]:
    context = browser.new_context(base_url=address, viewport=WIDE)
    context.set_default_timeout(10_000)
    yield context.new_page()
    context.close()


def violations(page: Page) -> list[str]:
    """What axe-core finds serious or critical, with the elements concerned."""
    page.evaluate(SIMPLER)
    # Contrast is measured below, on every text: axe-core takes a minute for that on a chapter.
    rules = {"color-contrast": {"enabled": False}}
    options = {"resultTypes": ["violations"], "preload": False, "rules": rules}
    found = Axe().run(page, options=options).response
    return [
        f"{rule['id']}: {node['html'][:200]} {node['failureSummary']}"
        for rule in found["violations"]
        if rule["impact"] in ("serious", "critical")
        for node in rule["nodes"]
    ]


# The contrast of each text that can be seen, as WCAG 2 defines it, from the computed colours: one
# entry a pair of colours, with what is asked of it (3 for large text, else 4.5) and a sample.
CONTRAST = """() => {
    const parse = text => {
        const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number);
        return text.startsWith('color(srgb') ? [255 * r, 255 * g, 255 * b, a] : [r, g, b, a];
    };
    const over = ([r, g, b, a], under) => [r, g, b].map((c, i) => a * c + (1 - a) * under[i]);
    const light = rgb => {
        const [r, g, b] = rgb.map(c => c / 255)
            .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const grounds = new Map();
    const ground = element => {
        if (!element) return [255, 255, 255];
        if (!grounds.has(element)) {
            const own = parse(getComputedStyle(element).backgroundColor);
            grounds.set(element, over(own, own[3] < 1 ? ground(element.parentElement) : own));
        }
        return grounds.get(element);
    };
    const found = new Map();
    const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (texts.nextNode()) {
        const element = texts.currentNode.parentElement;
        if (!texts.currentNode.data.trim() || !element.checkVisibility(
            {checkOpacity: true, checkVisibilityCSS: true})) continue;
        if (element.closest('script, style, .katex-mathml, .visually-hidden, option')) continue;
        const style = getComputedStyle(element);
        const color = parse(element.closest('svg') ? style.fill : style.color);
        const behind = ground(element.closest('svg')?.parentElement ?? element);
        const [high, low] = [light(over(color, behind)), light(behind)].sort((a, b) => b - a);
        const size = parseFloat(style.fontSize);
        const large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
        const key = [...color, ...behind, large].join();
        if (!found.has(key)) found.set(key, [(high + 0.05) / (low + 0.05), large ? 3 : 4.5,
            texts.currentNode.data.trim().slice(0, 60)]);
    }
    return [...found.values()];
}"""


def faint(page: Page) -> list[list]:
    """The texts of a page that are hard to read, as CONTRAST tells them."""
    contrasts = page.evaluate(CONTRAST)
    assert contrasts
    return [found for found in contrasts if found[0] < found[1]]


# Formulas and coloured code are many thousands of spans: boxes of their size do for axe-core.
SIMPLER = """() => {
    for (const box of document.querySelectorAll('.katex, .highlight pre')) {
        const {width, height} = box.getBoundingClientRect();
        box.textContent = box.textContent.slice(0, 20);
        Object.assign(box.style, {display: 'inline-block', width: `${width}px`,
            height: `${height}px`, overflow: box.matches('pre') ? 'auto' : 'hidden'});
    }
}"""

OVERFLOW = """() => [...document.querySelectorAll('.bd-article *, p')]
    .filter(e => e.getBoundingClientRect().right > innerWidth + 1
        && !e.closest('pre, table, svg, .cell_output, .katex, .math, [tabindex]'))
    .slice(0, 5).map(e => e.outerHTML.slice(0, 160))"""

# Boxes that scroll sideways, and that the keyboard does not reach.
UNREACHED = """() => [...document.querySelectorAll('main *')]
    .filter(e => e.scrollWidth > e.clientWidth && e.tabIndex < 0
        && ['auto', 'scroll'].includes(getComputedStyle(e).overflowX))
    .map(e => e.outerHTML.slice(0, 160))"""


# Pictures whose type is smaller than it was set: matplotlib's PNG has 144 pixels an inch, SVG its
# own size, and the layer's drawings are set half a point larger for it.
SHRUNK = """() => [...document.querySelectorAll('.bd-article .cell_output img')].map(img => {
    const set = img.src.endsWith('.svg') ? 1.06 : 1.5;
    const size = img.getBoundingClientRect().width / img.naturalWidth * set;
    return [img.alt.slice(0, 60), Math.round(100 * size)];
}).filter(([, percent]) => percent < 99)"""

# Code that does not fit its box, folded or not: more than 85 columns.
SIDEWAYS = """() => {
    const folds = [...document.querySelectorAll('.bd-article details:not([open])')];
    for (const fold of folds) fold.open = true;
    const wide = [...document.querySelectorAll('.bd-article .cell_input pre')]
        .filter(pre => pre.scrollWidth > pre.clientWidth + 1)
        .filter(pre => !/pip install/.test(pre.innerText))
        .map(pre => pre.innerText.slice(0, 80));
    for (const fold of folds) fold.open = false;
    return wide;
}"""

# In tables: words of neighbouring cells that nearly touch, and labels and numbers that are broken.
CRAMPED = """() => {
    const boxes = cell => {
        const found = [], texts = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT);
        while (texts.nextNode()) {
            const text = texts.currentNode, range = document.createRange();
            if (!text.data.trim() || text.parentElement.closest('.katex-mathml')) continue;
            range.selectNodeContents(text);
            found.push(...[...range.getClientRects()].filter(box => box.width));
        }
        return found;
    };
    const found = [];
    for (const row of document.querySelectorAll('.bd-article :is(.table, .dataframe) tr')) {
        let end = -Infinity;
        for (const cell of row.cells) {
            const lines = boxes(cell), text = cell.textContent.trim();
            if (!lines.length) continue;
            const left = Math.min(...lines.map(box => box.left));
            if (left - end < 8) found.push(`touches: ${text}`);
            end = Math.max(...lines.map(box => box.right));
            const whole =
                /^[-+−±~<>≤≥]?\\s?\\d[^a-z\\u3000-\\uffee]*$|\\d%? to [-+−]?\\d/.test(text);
            const label = !cell.cellIndex && !cell.closest('.runs')
                && text.replace(/[\\u3000-\\uffee]/g, 'xx').length <= 24;
            if (!(whole && text.length <= 40) && !label) continue;
            if (cell.querySelector('br, code, .katex')) continue;
            if (lines.at(-1).top - lines[0].top > 8) found.push(`broken: ${text}`);
        }
    }
    return found;
}"""


def faults(context: BrowserContext, name: str) -> dict[str, list]:
    """What is wrong with a page in light, in dark and at a phone's width, by kind."""
    page = context.new_page()
    errors, requests, missing = [], [], []
    page.on("console", lambda message: message.type == "error" and errors.append(message.text))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.on("requestfailed", lambda request: missing.append(request.url))
    page.on("response", lambda response: response.status >= 400 and missing.append(response.url))
    home = page.goto(name).url.removesuffix(name)
    found = {"mathematics": page.locator(".math:not(:has(.katex)), .katex-error").all_inner_texts()}
    texts = "main :is(p, li, th, td, h1, h2, h3)"  # code may hold what looks like a formula
    text = "\n".join(page.locator(texts).all_inner_texts())
    found["mathematics"] += re.findall(r"\$\$|\\\(|\\\[|\\frac|\\mathrm", text)
    page.add_style_tag(content="* { transition: none !important; }")  # themes fade into each other
    found["light"] = faint(page)
    found["type"] = page.evaluate(SHRUNK)
    found["code"] = page.evaluate(SIDEWAYS)
    found["tables"] = page.evaluate(CRAMPED)
    page.emulate_media(color_scheme="dark")
    page.wait_for_function("document.documentElement.dataset.theme === 'dark'")
    found["dark"] = faint(page)
    page.set_viewport_size(PHONE)
    found["phone"] = page.evaluate(OVERFLOW)
    width = page.evaluate("document.documentElement.scrollWidth")
    found["phone"] += [width] if width > PHONE["width"] else []
    found["tables"] += page.evaluate(CRAMPED)
    found["keyboard"] = page.evaluate(UNREACHED)
    if name == FULLEST or not re.match(r"book/\d", name):
        page.set_viewport_size(WIDE)
        found["axe"] = violations(page)
    page.close()
    found |= {"errors": errors, "missing": missing}
    found["foreign"] = [url for url in requests if not url.startswith((home, "data:"))]
    return {kind: seen for kind, seen in found.items() if seen}


@pytest.fixture(scope="module")
def light(browser, address) -> Iterator[BrowserContext]:
    """One for all pages, so that they share what they load."""
    context = browser.new_context(base_url=address, viewport=WIDE, color_scheme="light")
    yield context
    context.close()


@pytest.mark.parametrize("name", ALL)
def test_a_page_is_whole_and_can_be_read(light, address, name):
    expected = {}
    if name == MISSING:  # the one answer that has to be 404
        expected = {"missing": [address + MISSING], "errors": [ANY]}
    assert faults(light, name) == expected


# A page with every kind of fault.
BAD = """<!doctype html><html><head><title>bad</title><style>
p { color: #999; background: #fff; }
@media (prefers-color-scheme: dark) { p { color: #333; background: #000; } }
</style></head><body><main style='width: 900px'>
<p>hardly to be read</p><input><p>$$x$$</p>
<div style='width: 99px; overflow: auto'><div style='width: 999px'>long</div></div>
<img src='none.png' alt=''><img src='https://example.org/a.png' alt=''>
<div class='bd-article'><div class='cell_output'><img alt='small' width=60
src="data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' width='100' height='9'/%3E"></div>
<div class='cell_input' style='width: 99px'>
<pre style='overflow: hidden'>a = "much longer"</pre></div>
<table class='table' style='border-spacing: 0; width: 9px'><tr>
<td style='padding: 0'>two words</td>
<td style='padding: 0'>1.0 to 2.0</td></tr></table></div></main><script>
matchMedia('(prefers-color-scheme: dark)').onchange =
    () => { document.documentElement.dataset.theme = 'dark'; };
undefined_name;
</script></body></html>"""


def test_faults_are_seen(light):
    light.route("**/bad.html", lambda route: route.fulfill(body=BAD, content_type="text/html"))
    light.route("https://example.org/*", lambda route: route.fulfill(body=""))
    found = faults(light, "bad.html")
    assert found["light"] == [[pytest.approx(2.85, abs=0.01), 4.5, "hardly to be read"]]
    assert found["dark"] == [[pytest.approx(1.66, abs=0.01), 4.5, "hardly to be read"]]
    assert {text.split(":")[0] for text in found["axe"]} >= {"label", "html-has-lang"}
    assert found["mathematics"] == ["$$", "$$"]
    assert found["phone"][-1] > PHONE["width"] and "<p>" in found["phone"][0]
    assert found["type"] == [["small", 90]] and found["code"] == ['a = "much longer"']
    assert found["tables"][:3] == ["broken: two words", "touches: 1.0 to 2.0", "broken: 1.0 to 2.0"]
    assert len(found["keyboard"]) == 1 and "999px" in found["keyboard"][0]
    assert any("undefined_name" in text for text in found["errors"])
    assert [url.rpartition("/")[2] for url in found["missing"]] == ["none.png"]
    assert found["foreign"] == ["https://example.org/a.png"]


@pytest.mark.parametrize("size", [WIDE, PHONE])
def test_search_finds_a_word(page, size):
    page.set_viewport_size(size)
    page.goto("book/glossary.html")
    page.locator(".search-button, .search-button-field").locator("visible=true").click()
    page.locator("dialog input[type=search]").fill("dropout")
    page.keyboard.press("Enter")
    page.locator("#search-results li a", has_text="Dropout for each head").first.click()
    expect(page.locator("article h1")).to_contain_text("Dropout for each head")


# A word, and the section that has to come first.
FOUND = {
    "vLLM": "book/11b_tools.html#vllm",
    "Ollama": "book/11b_tools.html#llama-cpp-and-ollama",
    "chat template": "book/11b_tools.html#code-chat-templates",
    "merge": "book/00_fifteen_minutes.html#merge-or-export",
    "install": "index.html#install",
    "Colab": "index.html#install",
}


@pytest.mark.parametrize("word", FOUND)
def test_search_leads_to_the_section(page, word):
    page.goto(f"search.html?q={word}")
    first = page.locator("#search-results li").first
    expect(first.locator("p.context")).to_contain_text(re.compile(word[:4], re.I))
    assert FOUND[word] in first.locator("a").first.evaluate("a => a.href")
    first.locator("a").first.click()
    expect(page.locator("article section:target > :is(h2, h3)")).to_be_in_viewport()


def test_search_knows_words_only(page):
    """No set-up cell, no formula, no list of a page's sections."""
    page.goto("search.html?q=find_spec")  # every set-up cell has it
    expect(page.locator(".search-summary")).to_contain_text("did not match any")
    page.goto("search.html?q=router")
    expect(page.locator(".search-summary")).to_contain_text("found")
    excerpts = " ".join(page.locator("#search-results p.context").all_inner_texts())
    assert "router" in excerpts and not re.search(r"\\[a-z(\[]|Further reading", excerpts)


def test_a_missing_page_leads_back_and_next_leads_on(page):
    page.goto(MISSING)
    page.locator("article a", has_text="first page").click()
    expect(page.locator("article h1")).to_contain_text("R-LoRA, built and measured")
    page.locator("a.right-next").click()
    page.wait_for_url(f"**/{PAGES[1]}.html")


def test_a_missing_page_is_styled_where_the_site_has_a_host_of_its_own(page, address, built):
    """As `make serve` has it: the site's root is the host's."""
    host = address.removesuffix(PATH)

    def serve(route: Route) -> None:
        file = built.root / urlsplit(route.request.url).path.lstrip("/")
        route.fulfill(path=file if file.is_file() else built.root / "404.html")

    page.route(f"{host}/**", serve)
    page.goto(f"{host}/{MISSING}")
    assert page.locator("article h1").evaluate("h => getComputedStyle(h).fontWeight") == "700"
    page.locator("article a", has_text="first page").click()
    page.wait_for_url(f"{host}/index.html")


# The form of pages. Each looks at the pages where the thing is most, or was wrong.

FORMULAS = """() => [...document.querySelectorAll('.bd-article div.math')].map(box => ({
    tex: box.textContent.slice(0, 60), wide: box.scrollWidth > box.clientWidth + 1,
    shows: box.tabIndex === 0 && getComputedStyle(box).maskImage !== 'none'
        && getComputedStyle(box).scrollbarWidth === 'thin',
    wrong: box.querySelector('.katex-error') !== null}))"""


@pytest.mark.parametrize(
    "chapter", ["05_random_heads", "07_rlora", "13_choosing_the_randomness", "15_looking_inside"]
)
def test_a_wide_equation_breaks_or_shows_that_it_scrolls(page, chapter):
    page.goto(f"book/{chapter}.html")
    page.wait_for_load_state("load")
    page.wait_for_timeout(500)  # fonts, after which equations are measured
    assert [f for f in page.evaluate(FORMULAS) if f["wide"] or f["wrong"]] == []
    page.set_viewport_size(PHONE)
    page.reload()
    page.wait_for_timeout(500)
    formulas = page.evaluate(FORMULAS)
    assert [f for f in formulas if f["wrong"] or (f["wide"] and not f["shows"])] == []
    assert sum(f["wide"] for f in formulas) <= 2


def test_pictures_fit_a_phone_and_a_tap_enlarges_them(page):
    page.set_viewport_size(PHONE)
    page.goto("book/08_does_it_help.html")
    widths = page.locator(".bd-article img").evaluate_all(
        "all => all.map(img => [img.getBoundingClientRect().right, img.naturalWidth])"
    )
    assert len(widths) > 5 and all(right <= PHONE["width"] for right, natural in widths if natural)
    page.locator(".bd-article button.enlarge").nth(1).click()
    large = page.locator("dialog.enlarged img")
    assert large.bounding_box()["width"] > 1.8 * PHONE["width"]
    page.keyboard.press("Escape")
    expect(large).to_have_count(0)


PANELS = """() => [...document.querySelectorAll('.bd-article .tag_panels .cell_output')].map(box =>
    [...box.querySelectorAll('img')].map(img => {
        const {left, right, top, bottom, width} = img.getBoundingClientRect();
        return {left, right, top, bottom, share: width / box.clientWidth};
    }))"""


@pytest.mark.parametrize("chapter", ["01_low_rank", "05b_pulled_apart"])
def test_panels_stand_side_by_side_or_one_below_the_other(page, chapter):
    page.goto(f"book/{chapter}.html")
    cells = page.evaluate(PANELS)
    assert cells
    for panels in cells:
        across = 2 if len(panels) % 3 else 3
        assert len(panels) % across == 0
        for row in (panels[i : i + across] for i in range(0, len(panels), across)):
            for one, next in itertools.pairwise(row):
                assert one["right"] <= next["left"] and abs(one["top"] - next["top"]) < 4
            assert sum(panel["share"] for panel in row) > 0.9
    page.set_viewport_size(PHONE)
    for panels in page.evaluate(PANELS):
        assert all(panel["share"] > 0.95 for panel in panels)
        for one, next in itertools.pairwise(panels):
            assert one["bottom"] <= next["top"]


def test_the_first_page_shows_the_finding_and_the_ways_in(page, built):
    page.set_viewport_size({"width": 1280, "height": 900})
    page.goto("index.html")
    for part in [page.locator("article p").first, *page.locator(".ways a, .first img").all()]:
        expect(part).to_be_in_viewport(ratio=1)
    assert page.locator(".ways a").count() == 3 and page.locator(".first img").count() == 2
    page.set_viewport_size({"width": 390, "height": 844})
    for way in page.locator(".ways a").all():
        expect(way).to_be_in_viewport(ratio=1)
    for picture in page.locator(".first img").all():
        text = (built.root / picture.get_attribute("src")).read_text()
        width = float(re.search(r'viewBox="0 0 ([\d.]+)', text)[1])
        smallest = min(float(n) for n in re.findall(r"font(?:-size)?:[^;\"]*?([\d.]+)px", text))
        assert smallest * picture.bounding_box()["width"] / width >= 12


@pytest.mark.parametrize("name", ["index", "book/08_does_it_help", "book/10_paper_and_code"])
def test_numbers_in_tables_stand_under_one_another(page, name):
    page.goto(f"{name}.html")
    cells = page.locator(".bd-article :is(.table, .dataframe) td")
    found = cells.filter(
        has_text=re.compile(r"^\s*[-+−]?[\d.,]+( \(.* to .*\))?\s*$")
    ).evaluate_all(
        "all => all.map(e => getComputedStyle(e)).map(s => [s.textAlign, s.fontVariantNumeric])"
    )
    assert len(found) > 10
    assert {tuple(style) for style in found} == {("right", "tabular-nums")}


# Where the last word of a heading stands, and its anchor; a formula, and the stop after it.
LINES = """() => {
    const middle = rect => (rect.top + rect.bottom) / 2;
    const last = node => {
        const range = document.createRange();
        range.selectNodeContents(node);
        return middle([...range.getClientRects()].at(-1));
    };
    const anchors = [...document.querySelectorAll('.bd-article :is(h1, h2, h3) > a.headerlink')];
    const stops = [...document.querySelectorAll('.bd-article .nobreak')];
    const lone = [...document.querySelectorAll('.bd-article .math')]
        .filter(e => /^[.,;:!?)]/.test(e.nextSibling?.data ?? '') && !e.closest('.nobreak'));
    return {
        anchors: anchors.map(
            a => Math.abs(last(a.previousSibling) - middle(a.getBoundingClientRect()))),
        stops: stops.filter(e => {
            const bases = [...e.querySelectorAll('.katex-html .base')];
            return Math.abs(last(e.lastChild) - middle(bases.at(-1).getBoundingClientRect())) > 16;
        }).map(e => e.textContent),
        bound: stops.length, lone: lone.length};
}"""


def test_no_line_begins_with_an_anchor_or_a_stop(page):
    page.goto("book/05_random_heads.html")
    for width in range(340, 480, 10):
        page.set_viewport_size({"width": width, "height": 800})
        lines = page.evaluate(LINES)
        assert max(lines["anchors"]) < 16 and lines["stops"] == [] and lines["lone"] == 0
    assert lines["bound"] > 30


STYLE = "(e, names) => names.map(name => getComputedStyle(e)[name])"


def test_headings_weigh_by_rank_and_pictures_have_one_card_in_the_dark(page):
    page.emulate_media(color_scheme="dark")
    page.goto("book/08_does_it_help.html")
    sizes = []
    for heading in ("h2", "h3"):
        style = page.locator(f"article {heading}").first.evaluate(STYLE, ["fontWeight", "fontSize"])
        sizes.append([float(value.removesuffix("px")) for value in style])
    (weight, size), (lesser, smaller) = sizes
    assert weight > lesser and size > 1.2 * smaller
    for picture in page.locator("article .cell_output img").all():
        own = picture.evaluate(STYLE, ["backgroundColor", "filter"])
        around = picture.locator("..").evaluate(STYLE, ["backgroundColor"])
        assert own + around == ["rgb(255, 255, 255)", "none", "rgba(0, 0, 0, 0)"]


def test_search_stays_in_sight_on_the_last_pages(page):
    page.goto("book/references.html")
    page.locator(".bd-sidebar-primary").evaluate("e => { e.scrollTop = e.scrollHeight; }")
    expect(page.locator(".bd-sidebar-primary .search-button-field")).to_be_in_viewport(ratio=1)


# What a printed page would lose: what is not to be seen yet, what is cut, lines of code that break.
PRINTED = """() => {
    const all = selector => [...document.querySelectorAll(`.bd-article ${selector}`)];
    const style = (e, name) => getComputedStyle(e)[name];
    const columns = pre => Math.max(...pre.innerText.split('\\n').map(line => line.length));
    const lines = pre => pre.innerText.trimEnd().split('\\n').length;
    const room = pre => pre.clientHeight - 2 * parseFloat(style(pre, 'paddingTop'));
    return {
        moving: all('details.hide *').filter(e => style(e, 'animationName') !== 'none').length,
        heads: all('details.hide > summary').filter(e => style(e, 'display') !== 'none').length,
        cut: all('*').filter(e => !e.closest('.katex') && e.scrollWidth > e.clientWidth + 1
            && style(e, 'display') !== 'inline' && e.clientWidth > 1)
            .map(e => e.outerHTML.slice(0, 80)),
        broken: all('.cell_input pre').filter(pre => columns(pre) <= 85
            && room(pre) > (lines(pre) + 0.9) * parseFloat(style(pre, 'lineHeight')))
            .map(pre => pre.innerText.slice(0, 80)),
    };
}"""


@pytest.mark.parametrize("chapter", ["04_many_heads", "09_gpu_benchmark"])
def test_print_shows_whole_code_and_open_solutions(page, chapter):
    page.set_viewport_size({"width": 718, "height": 1047})  # A4, less a centimetre at each side
    page.goto(f"book/{chapter}.html")
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    folded = page.locator("details.hide")
    assert folded.count() > 3 and page.locator("details.hide:not([open])").count() == 0
    assert page.evaluate(PRINTED) == {"moving": 0, "heads": 0, "cut": [], "broken": []}
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details.hide[open]").count() == 0


def test_the_japanese_page_is_a_translation(page):
    page.goto("book/for_deciders.html")
    page.locator("article a", has_text="日本語").click()
    page.wait_for_url("**/for_deciders.ja.html")
    text = page.locator("article").inner_text()
    for words in ("導入を判断する方へ", "性能の低下", "コスト", "優位性は", "英語"):
        assert words in text
    slanted = "all => all.filter(e => getComputedStyle(e).fontStyle !== 'normal').length"
    assert page.locator("article *").evaluate_all(slanted) == 0
    broken = "all => all.filter(e => e.getClientRects().length > 1).length"
    page.set_viewport_size(PHONE)
    assert page.locator("article a", has_text="第").evaluate_all(broken) == 0


def test_folded_solutions_open_by_mouse_and_close_by_keyboard(page):
    page.goto("book/04_many_heads.html")
    folded = page.locator("details.hide").last
    code = folded.locator("pre").first
    expect(code).to_be_hidden()
    folded.locator("summary").click()
    expect(code).to_be_visible()
    page.keyboard.press("Enter")
    expect(code).to_be_hidden()


def test_the_status_page_tells_each_run(page, built):
    """Every stamp, as it stands in the notebooks."""
    page.goto("book/status.html")
    rows = page.locator(".runs tbody tr").all()
    assert len(rows) == len(CHAPTERS)
    for row, path in zip(rows, CHAPTERS, strict=True):
        stamp = read(path).metadata["rlora_book"]
        told = {text.strip() for text in row.locator("td").all_inner_texts()}
        assert {str(stamp[key]) for key in stamp if key != "hash"} <= told


# The playground


def fill(page: Page, **settings) -> None:
    for key, value in settings.items():
        page.locator(f"#set-{key}").fill(str(value))


def shown(page: Page, key: str) -> float:
    """The first number of an output."""
    text = page.locator(f"#out-{key}").inner_text().replace(",", "").split("±")[-1]
    return float(re.search(r"[\d.]+", text)[0])


def adapted(N, r, p, d_in, d_out, alpha=32.0, gamma=64.0) -> nn.Module:
    config = RLoraConfig(
        r=r, num_heads=N, lora_dropout=p, lora_alpha=alpha, gamma=gamma, target_modules=["0"]
    )
    return get_peft_model(nn.Sequential(nn.Linear(d_in, d_out, bias=False)), config).train()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"N": 1, "r": 8, "d_in": 64, "d_out": 48, "p": 0},
        {"N": 2, "r": 64, "d_in": 7, "d_out": 5, "alpha": 8, "gamma": 2.5},
    ],
)
def test_the_playground_counts_what_rlora_min_has(page, settings):
    page.goto("book/playground.html")
    fill(page, **settings)
    settings = {"N": 3, "r": 4, "p": 0.1, "d_in": 896, "d_out": 4864} | settings  # the defaults
    model = adapted(**settings)
    sizes = {name: tensor.numel() for name, tensor in model.state_dict().items()}
    parts = {"A": "rlora_A.", "heads": "rlora_B.", "router": "rlora_router."}
    for key, part in parts.items():
        assert shown(page, key) == sum(n for name, n in sizes.items() if part in name)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert shown(page, "trained") == trained
    frozen = sum(n for name, n in sizes.items() if "rlora_A0" in name or "rlora_B0" in name)
    assert shown(page, "pair") == frozen
    d_in, d_out = settings["d_in"], settings["d_out"]
    assert shown(page, "lora") == pytest.approx(trained / (d_in + d_out), abs=0.006)
    assert shown(page, "share") == pytest.approx(100 * trained / (d_in * d_out), rel=0.006)
    one, two = (
        kept_bytes(model, partial(model, torch.randn(T, d_in, requires_grad=True)))[1] // 4
        for T in (3, 4)
    )
    assert shown(page, "kept") == two - one
    assert shown(page, "bytes") == 4 * (two - one)
    assert shown(page, "once") == one - 3 * (two - one)
    config = model.peft_config["default"]
    assert shown(page, "s") == pytest.approx(config.scaling, rel=0.006)


def test_the_playground_foretells_how_a_layer_starts(page):
    torch.manual_seed(0)
    settings = {"N": 6, "r": 8, "p": 0.3, "d_in": 256, "d_out": 512, "alpha": 12, "gamma": 40}
    page.goto("book/playground.html")
    fill(page, **settings)
    model = adapted(**settings)
    layer = model.base_model.model[0]
    A, B = layer.rlora_A["default"].weight, layer.rlora_B["default"].weight
    x = torch.randn(256, 256)
    out = model.peft_config["default"].scaling * x @ A.T @ B.unflatten(1, (6, 8))[:, 0].T
    assert shown(page, "start") == pytest.approx(out.square().mean().sqrt().item(), rel=0.15)
    off = ~torch.eye(6, dtype=torch.bool)
    cosines = head_similarity(model)["0"][off]
    assert shown(page, "cosine") == pytest.approx(cosines.std().item(), rel=0.7)
    delta = torch.randn(256, 512)
    (model(x) * delta).sum().backward()
    heads = B.grad.unflatten(1, (6, 8)).transpose(0, 1).flatten(1)
    alike = torch.corrcoef(heads)[off].mean().item()
    assert shown(page, "gradients") == pytest.approx(alike, abs=0.1)


def test_the_playground_by_keyboard_and_ear(page):
    page.goto("book/playground.html")
    heads = page.get_by_label("heads N")
    heads.focus()
    page.keyboard.press("ArrowRight")
    assert heads.input_value() == "4" and page.locator("#is-N").inner_text() == "4"
    expect(page.locator("#playground-status")).to_contain_text("4 heads of rank 4")
    expect(page.get_by_role("img", name="Each of 4 heads")).to_be_visible()
    before = shown(page, "trained")
    field = page.get_by_label("inputs d")
    field.fill("0")
    expect(page.get_by_role("alert")).to_contain_text("inputs d_in must be a whole number from 1")
    border = "e => getComputedStyle(e).borderTopColor"
    assert field.evaluate(border) != page.get_by_label("outputs d").evaluate(border)
    assert shown(page, "trained") == before
    page.get_by_role("button", name="Start again").click()
    expect(page.locator("#is-N")).to_have_text("3")
    assert page.get_by_role("alert").inner_text() == ""
    picture = page.locator("#playground .drawing svg")
    masks = picture.inner_html()
    page.get_by_label("dropout p").fill("0.5")
    page.get_by_role("button", name="Draw new masks").click()
    assert picture.inner_html() != masks


def test_the_playground_compares_and_keeps_its_settings_in_the_address(page):
    page.goto("book/playground.html")
    small = shown(page, "trained")
    page.get_by_role("button", name="7B model").click()
    assert shown(page, "trained") > 3 * small
    fill(page, r=16)
    assert "r=16&d_in=3584&d_out=18944" in page.url
    settings = {"N": 3, "r": 16, "p": 0.1, "d_in": 3584, "d_out": 18944}
    page.reload()
    assert {key: float(page.locator(f"#set-{key}").input_value()) for key in settings} == settings
    widths = page.locator("#playground .bars rect").evaluate_all(
        "all => all.map(rect => rect.getBoundingClientRect().width)"
    )
    rlora, lora, one = sum(widths[:3]), sum(widths[3:5]), sum(widths[5:])
    assert rlora == pytest.approx(lora, rel=0.01)
    trained, alone = shown(page, "trained"), 16 * (3584 + 18944)
    assert one / rlora == pytest.approx(alone / trained, rel=0.01)
    narrow = page.locator("#playground .drawing .random").first.bounding_box()["height"]
    fill(page, d_out=16)
    wide = page.locator("#playground .drawing .random").first.bounding_box()["height"]
    assert wide < narrow
    page.get_by_role("button", name="Start again").click()
    expect(page).to_have_url(re.compile(r"playground\.html$"))


def test_without_scripts_there_is_a_picture_in_its_place(browser, address):
    page = browser.new_page(base_url=address, java_script_enabled=False)
    page.goto("book/playground.html")
    picture = page.locator('article img[src*="rlora_layer"]')
    expect(picture).to_be_visible()
    assert "frozen side pair" in picture.get_attribute("alt")
    assert page.locator("#playground").count() == 0
    page.close()
