"""The rule by which chapters take minutes, and the command that prints it."""

import reading
from bs4 import BeautifulSoup
from chapter_code import CHAPTERS
from nbformat.v4 import new_code_cell as code
from nbformat.v4 import new_markdown_cell as markdown
from project import ROOT, needs_chromium


def folded_cell(source: str, tag: str, **mystnb: str) -> dict:
    return code(source, metadata={"tags": [tag], "mystnb": mystnb})


def test_what_is_counted_and_what_is_not():
    cells = [
        markdown("## Code\n\nFour words of [prose](a/long/address.ipynb)."),  # with ## Code: six
        code("a = 1\n\nb = 2"),
        folded_cell("plt.plot()", "hide-input"),
        folded_cell("# @title Solution", "hide-cell"),
        markdown("## Exercises"),
        code("c = 3"),
        markdown("## Next\n\nOn."),
    ]
    assert reading.count(cells) == (6 + 3, 2)


def test_what_is_folded_is_listed_by_what_it_does():
    source = "fig, ax = plt.subplots()\n\nax.plot(y)"
    drawing = folded_cell(source, "hide-input", code_prompt_show="Show the drawing")
    cells = [markdown("## Code\n\n### A layer"), code("a = 1"), drawing]
    assert reading.folded(cells) == [("drawing", 2, "A layer")]


def test_the_first_page_states_the_rule():
    text = " ".join((ROOT / "index.md").read_text().split())
    assert f"{reading.WORDS} words a minute" in text
    assert f"visible code at {reading.LINES} lines a minute" in text


def test_the_first_page_has_the_minutes_of_each_chapter(built):
    page = BeautifulSoup((built.root / "index.html").read_text(), "html.parser")
    for path in CHAPTERS:
        row = page.select_one(f'td a[href="book/{path.stem}.html"]').find_parent("tr")
        minutes = f"{reading.read_minutes(path):.0f}"
        assert minutes in [cell.text.strip() for cell in row("td")], path.stem


@needs_chromium
def test_the_command_prints_minutes_and_heights(built, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["reading.py", "--site", str(built.root)])
    assert reading.main() == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.split() == ["chapter", "words", "lines", "folded", "minutes", "closed", "open"]
    assert [line.split()[0] for line in lines] == [path.stem for path in CHAPTERS]
    for line in lines:
        *_, minutes, closed, opened = map(int, line.split()[1:])
        assert 1 < minutes <= 25
        assert 2000 < closed < 1.02 * 18_000 and closed < opened  # letters differ a little


@needs_chromium
def test_a_page_that_was_not_built_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["reading.py", "--site", str(tmp_path)])
    assert reading.main() == 1
    assert f"{CHAPTERS[0].stem}.html was not built: make book" in capsys.readouterr().err
