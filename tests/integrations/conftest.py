"""These tests need packages that `make test-integrations` installs, into its own environment."""

from importlib.util import find_spec

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

collect_ignore_glob = [] if find_spec("opacus") else ["test_*.py"]


@pytest.fixture(scope="session")
def words() -> PreTrainedTokenizerFast:
    """A tokenizer of the words w1 to w28."""
    known = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(1, 29))]
    made = Tokenizer(WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>"))
    made.pre_tokenizer = WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)
