"""What the tests of `rlora_lab` share: sentences, small bases with MiniLM's tokenizer, workers."""

from concurrent.futures import Future
from pathlib import Path

import pytest
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from rlora_lab.models.bases import load_base
from rlora_lab.runs import worker

SENTENCES = Path(__file__).parents[1] / "fixtures" / "sentences"


@pytest.fixture
def sentences_folder(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The fixture of the sentences format, in RLORA_DATA."""
    monkeypatch.setenv("RLORA_DATA", str(SENTENCES))
    return SENTENCES


def small_base(folder: Path, model: type[PreTrainedModel], config: type[PretrainedConfig]) -> Path:
    """A random model of width 32 with MiniLM's tokenizer, in a folder."""
    tokenizer = load_base("minilm").tokenizer
    sizes = {"hidden_size": 32, "intermediate_size": 64}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2}
    model(config(vocab_size=len(tokenizer), **sizes, **layers)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small encoder."""
    return small_base(tmp_path_factory.mktemp("bases") / "tiny-bert", BertModel, BertConfig)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small causal model."""
    folder = tmp_path_factory.mktemp("bases") / "tiny-llama"
    return small_base(folder, LlamaForCausalLM, LlamaConfig)


class Here:
    """A pool whose workers are this process."""

    def __init__(self, *args) -> None:
        pass

    def submit(self, function, *args):
        future: Future = Future()
        try:
            future.set_result(function(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def shutdown(self, **kwargs) -> None:
        pass


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder to work in, with workers that tests can look into."""
    monkeypatch.setattr(worker, "ProcessPoolExecutor", Here)
    monkeypatch.chdir(tmp_path)
    return tmp_path
