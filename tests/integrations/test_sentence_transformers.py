"""sentence-transformers: `add_adapter`, training, saving, loading; equal to PEFT's own calls."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from one_step import LR, TRAINER, TRIED, Step, adapter_of, assert_same_step, far, one_step
from peft import get_peft_model
from rlora_helpers import KINDS, METHODS, perturb
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, BertModel

from rlora_min import RLoraConfig

pytestmark = [
    pytest.mark.integrations,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
TARGETS = list(KINDS["bert"].targets)
TEXTS = ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9", "w2"]
OTHERS = ["w3 w2", "w7", "w9 w1", "w2 w4 w6"]
SCORES = [0.1, 0.9, 0.4, 0.7]


@pytest.fixture(scope="module")
def folder(words, tmp_path_factory) -> Path:
    """A tiny sentence encoder on disk, and the BERT in it beside."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    config = KINDS["bert"].base().config
    config.update({"initializer_range": 0.3, "hidden_dropout_prob": 0.0})
    BertModel(config).save_pretrained(folder / "bert")
    words.save_pretrained(folder / "bert")
    encoder = Transformer(str(folder / "bert"))
    pooling = Pooling(encoder.get_embedding_dimension())
    SentenceTransformer(modules=[encoder, pooling], device="cpu").save_pretrained(
        str(folder / "sentences")
    )
    return folder


def load(folder: Path) -> SentenceTransformer:
    return SentenceTransformer(str(folder / "sentences"), device="cpu")


def config_of(method: str) -> RLoraConfig:
    shared = {"target_modules": TARGETS, "task_type": "FEATURE_EXTRACTION", "init_seed": 0}
    settings = {"lora_dropout": 0.0, "router_init": "kaiming"} | METHODS[method]
    return RLoraConfig(**settings | shared)


def adapted(folder: Path, method: str) -> SentenceTransformer:
    model = load(folder)
    model.add_adapter(config_of(method))
    return perturb(model)


def plain(folder: Path, model: SentenceTransformer, method: str) -> nn.Module:
    """The BERT alone, by PEFT's own call, with the same adapter."""
    bert = get_peft_model(AutoModel.from_pretrained(folder / "bert"), config_of(method))
    own, theirs = adapter_of(bert), adapter_of(model)
    for name, p in own.items():
        p.data.copy_(theirs[name.replace("base_model.model.", "0.model.")])
    return bert


def embedded(folder: Path, bert: nn.Module, texts: list[str]) -> Tensor:
    """The mean over tokens, which is what the pooling is."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "bert")
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    counted = batch["attention_mask"][..., None]
    return (bert(**inputs).last_hidden_state * counted).sum(1) / counted.sum(1)


@pytest.mark.parametrize("method", TRIED)
def test_a_step_of_its_trainer(folder, method, tmp_path):
    model = adapted(folder, method)
    bert = plain(folder, model, method)
    before = {name: p.detach().clone() for name, p in adapter_of(model).items()}
    embeddings = model.encode(TEXTS, convert_to_tensor=True)
    pairs = {"sentence1": TEXTS, "sentence2": OTHERS, "score": SCORES}
    SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(output_dir=str(tmp_path), **TRAINER),
        train_dataset=Dataset.from_dict(pairs),
        loss=CosineSimilarityLoss(model),
    ).train()
    moved = {}
    for name, p in adapter_of(model).items():
        moved[name.replace("0.model.", "base_model.model.", 1)] = p.detach() - before[name]

    def loss(bert: nn.Module, _) -> Tensor:
        cosines = F.cosine_similarity(embedded(folder, bert, TEXTS), embedded(folder, bert, OTHERS))
        return (cosines - torch.tensor(SCORES)).square().mean()

    assert far(embeddings, embedded(folder, bert, TEXTS)) < 1e-5
    expected = one_step(bert, None, run=loss, loss=lambda out: out)
    gradients = {name: -moved[name] / LR for name in expected.gradients}
    # In fp32, and the step is read off as a difference of weights.
    assert_same_step(Step(expected.output, gradients, moved), expected, bound=1e-3)


@pytest.mark.parametrize("method", TRIED)
def test_saved_loaded_switched_off_and_several(folder, method, tmp_path):
    model = adapted(folder, method)
    wanted = model.encode(TEXTS)
    bare = load(folder).encode(TEXTS)
    assert abs(wanted - bare).max() > 0.01
    model.save_pretrained(str(tmp_path))
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "model.safetensors").exists()
    assert abs(SentenceTransformer(str(tmp_path), device="cpu").encode(TEXTS) - wanted).max() < 1e-6

    other = load(folder)
    other.add_adapter(config_of(method), adapter_name="first")
    other.load_adapter(str(tmp_path), adapter_name="second")
    assert abs(other.encode(TEXTS) - wanted).max() < 1e-6
    other.set_adapter("first")
    assert other.active_adapters() == ["first"]
    other.disable_adapters()
    assert abs(other.encode(TEXTS) - bare).max() < 1e-6
    other.enable_adapters()
    other.set_adapter("second")
    assert abs(other.encode(TEXTS) - wanted).max() < 1e-6
    other.delete_adapter("first")
    assert abs(other.encode(TEXTS) - wanted).max() < 1e-6
