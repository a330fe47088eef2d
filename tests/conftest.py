"""What the tests share: no model hub, one thread a worker, each kind of base."""

import gc
import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)  # two workers of two threads each on two cores take five times as long
settings.register_profile("tests", deadline=None)  # that a machine is busy is no fault of the code
settings.load_profile("tests")


def pytest_collection_finish():
    """What the modules have imported is not looked through again whenever garbage is collected,
    which statsmodels does at each of Holm's corrections."""
    gc.freeze()


@pytest.fixture(params=["llama", "qwen2", "gpt2", "bert", "sequential"])
def kind(request):
    from rlora_helpers import KINDS

    return KINDS[request.param]


# What one worker does alone, because it is made once for all its tests: the built site, packages,
# a run of two processes.
TOGETHER = {
    "test_16b_serving.py": "server",
    "test_17_launched.py": "launched",
    "test_book.py": "site",
    "test_browser.py": "site",
    "test_kinds_sharded.py": "sharded",
    "test_reading.py": "site",
    "test_repository.py": "packages",
}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """`--dist loadgroup` by TOGETHER: pytest 9.2 ignores xdist_group (pytest-xdist, issue 1386)."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return TOGETHER.get(Path(nodeid.split("::")[0]).name, nodeid)

    return Scheduling(config, log) if config.getvalue("dist") == "loadgroup" else None
