"""What the tests of `rlora_min` share: no model hub, and each kind of base in turn."""

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(params=["llama", "qwen2", "gpt2", "bert", "sequential"])
def kind(request):
    from rlora_helpers import KINDS

    return KINDS[request.param]
