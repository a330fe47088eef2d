"""The built site, once for all tests that look at its pages."""

import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from project import ROOT


@dataclass
class Site:
    root: Path  # the folder with index.html
    seconds: float  # of CPU time that the build took


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> Site:
    """The site of a strict build."""
    out = tmp_path_factory.mktemp("book")
    command = [Path(sys.executable).parent / "jupyter-book", "build", ROOT]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = subprocess.run(
        [*command, "--path-output", out, "-n", "-W", "--keep-going"],
        capture_output=True,
        text=True,
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert run.returncode == 0, run.stdout + run.stderr
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Site(out / "_build" / "html", seconds)
