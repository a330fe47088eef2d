"""What the tests share: no model hub, one thread a worker, each kind of base, the built site."""

import os
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)  # two workers of two threads each on two cores take five times as long


@pytest.fixture(params=["llama", "qwen2", "gpt2", "bert", "sequential"])
def kind(request):
    from rlora_helpers import KINDS

    return KINDS[request.param]


# What one worker does alone, because it is made once for all its tests: the built site, packages.
TOGETHER = {"test_book.py": "site", "test_browser.py": "site", "test_repository.py": "packages"}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """`--dist loadgroup` by TOGETHER: pytest 9.2 ignores xdist_group (pytest-xdist, issue 1386)."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return TOGETHER.get(Path(nodeid.split("::")[0]).name, nodeid)

    return Scheduling(config, log) if config.getvalue("dist") == "loadgroup" else None


@dataclass
class Site:
    root: Path  # the folder with index.html
    seconds: float  # of CPU time that the build took


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> Site:
    """The site of a strict build."""
    out = tmp_path_factory.mktemp("book")
    command = [Path(sys.executable).parent / "jupyter-book", "build", Path(__file__).parent.parent]
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
