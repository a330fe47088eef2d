"""What the tests share: no model hub, one thread a worker, and each kind of base in turn."""

import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)  # two workers of two threads each on two cores take five times as long


@pytest.fixture(params=["llama", "qwen2", "gpt2", "bert", "sequential"])
def kind(request):
    from rlora_helpers import KINDS

    return KINDS[request.param]
