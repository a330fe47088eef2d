"""`make address`: every place has the new one, nothing else changes, no chapter is stale."""

import os
import subprocess
from pathlib import Path

import address
import execute
import pytest
from chapter_code import CHAPTERS, read
from environments import copy_project
from project import URL

NEW = "https://github.com/some-one/another.book"


@pytest.fixture
def copy(tmp_path) -> Path:
    return copy_project(tmp_path / "copy") or pytest.skip("no git repository to copy from")


def make_address(copy: Path, url: str) -> subprocess.CompletedProcess:
    # Called by another make, as in `make test`, it would tell of folders between the lines.
    command = ["make", "--no-print-directory", "address", f"URL={url}"]
    return subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)


def contents(folder: Path) -> dict[Path, bytes]:
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_every_place_has_the_new_one_and_nothing_else_changes(copy):
    before = contents(copy)
    done = make_address(copy, NEW)
    assert done.returncode == 0, done.stderr
    old, new = (url.removeprefix("https://github.com/").encode() for url in (URL, NEW))
    assert contents(copy) == {path: text.replace(old, new) for path, text in before.items()}
    changed = {str(path) for path, text in before.items() if old in text}
    assert {line.split(":")[0] for line in done.stdout.splitlines() if ": " in line} == changed
    assert {"README.md", "CITATION.cff", "_config.yml"} <= changed
    assert {f"book/{path.name}" for path in CHAPTERS} <= changed
    chapter = read(copy / "book" / CHAPTERS[0].name)
    hashes = [execute.notebook_hash(nb, CHAPTERS[0].stem) for nb in (chapter, read(CHAPTERS[0]))]
    assert hashes[0] == hashes[1]


WRONG = [
    "",
    "https://github.com/me",
    "http://github.com/me/book",
    "https://gitlab.com/me/book",
    "https://github.com/me/book/",
    "https://github.com/me/book.git",
    "https://github.com/my_org/book",
    "https://github.com/me/book; touch here",
]


def test_what_can_not_be_an_address_is_refused_and_nothing_changes(copy):
    before = contents(copy)
    for url in WRONG:
        done = make_address(copy, url)
        assert done.returncode != 0
        assert f"{url!r} can't be the address of the repository: it must be" in done.stderr
    assert contents(copy) == before


def test_a_full_disk_leaves_every_file_as_it_was(copy, monkeypatch):
    before, written = contents(copy), Path.write_bytes

    def full(path: Path, content: bytes) -> None:
        written(path, content[:9])
        if "17_many" in path.name:
            raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="no space"):
        address.set_address(copy, NEW)
    assert contents(copy) == before


def test_what_was_cut_short_can_be_done_again(copy, monkeypatch):
    replaced, calls = os.replace, []

    def cut(*paths) -> None:
        calls.append(paths)
        if len(calls) == 5:
            raise KeyboardInterrupt
        replaced(*paths)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", cut)
        address.set_address(copy, NEW)
    again = address.set_address(copy, NEW)
    assert len(again) > 5 and address.set_address(copy, NEW) == {}
    old = URL.removeprefix("https://github.com/").encode()
    assert not [path for path, text in contents(copy).items() if old in text]
