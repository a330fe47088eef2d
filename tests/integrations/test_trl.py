"""TRL's trainers: a step of each is the step that its loss, written out here, takes on the layer.

TRL does three things to an adapter: it casts what trains to bf16 on a quantized base, it copies the
parameters of an adapter that is trained on to a second one, "ref", and DPO and KTO set every
`nn.Dropout` to zero.
"""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from datasets import Dataset
from one_step import (
    TRAINER,
    WIDE,
    Step,
    adapter_of,
    assert_same_step,
    far,
    one_step,
    replaced,
    without_dropout,
)
from peft import PeftModel, get_peft_model
from rlora_helpers import KINDS, METHODS, adapt, evaluated, perturb, trained_of
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

from rlora_lab.chapters import ch11b_tools
from rlora_min import RLoraConfig

pytestmark = [
    pytest.mark.integrations,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
TARGETS = list(KINDS["llama"].targets)
TRIED = ["rlora", "centered", "mlora", "hydralora"]
PROMPTS = ["w1 w2 w3", "w4 w5", "w6 w7 w8", "w9"]
GOOD = [" w10 w11", " w12 w13 w14", " w15", " w16 w17"]
BAD = [" w18", " w19 w20", " w21 w22 w23", " w24 w25"]


def settings(folder: Path) -> dict:
    """One step of plain gradient descent with all examples, and TRL's defaults for the rest."""
    return {"output_dir": str(folder), "logging_steps": 1, "bf16": False, **TRAINER}


def trained_step(trainer) -> tuple[dict, Step]:
    """The batch, and the trainer's one step; its loss stands for the output."""
    batch = next(iter(trainer.get_train_dataloader()))
    model = trainer.model
    before = {name: p.detach().clone() for name, p in adapter_of(model).items()}
    gradients = {}

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, *_, **__):
            trained = {name: p for name, p in adapter_of(model).items() if p.grad is not None}
            gradients.update({name: p.grad.clone() for name, p in trained.items()})

    trainer.add_callback(Keep())
    trainer.train()
    moved = {name: p.detach() - before[name] for name, p in adapter_of(model).items()}
    (loss,) = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return batch, Step(torch.tensor(loss), gradients, moved)


def plain_step(model: nn.Module, batch: dict, loss: Callable[[nn.Module, dict], Tensor]) -> Step:
    """The same by hand."""
    return one_step(model, batch, run=loss, loss=lambda out: out)


# Preferences


SEEN = {"prompt": PROMPTS, "completion": [GOOD[0], BAD[1], GOOD[2], BAD[3]]}
PREFERRING = {
    "DPO": (DPOTrainer, DPOConfig, {"prompt": PROMPTS, "chosen": GOOD, "rejected": BAD}),
    "KTO": (KTOTrainer, KTOConfig, SEEN | {"label": [True, False, True, False]}),
}


def preferring(trainer: str, model: nn.Module, words, folder: Path) -> DPOTrainer | KTOTrainer:
    make, config, rows = PREFERRING[trainer]
    return make(
        model=model,
        args=config(**settings(folder)),
        train_dataset=Dataset.from_dict(rows),
        processing_class=words,
    )


BETA = 0.1  # TRL's default for both


def ratios(model: nn.Module, batch: dict) -> Tensor:
    """ln of policy over reference, the policy as it starts, of each row's whole completion."""
    ids, counted = batch["input_ids"], batch["completion_mask"][:, 1:]
    logits = model(input_ids=ids, attention_mask=batch["attention_mask"]).logits
    each = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    logs = (each * counted).sum(1)
    return logs - logs.detach()


def dpo_loss(model: nn.Module, batch: dict) -> Tensor:
    good, bad = ratios(model, batch).chunk(2)
    return -F.logsigmoid(BETA * (good - bad)).mean()


def kto_loss(model: nn.Module, batch: dict) -> Tensor:
    sign = torch.tensor([1.0 if label else -1.0 for label in batch["label"]])
    return (1 - torch.sigmoid(BETA * sign * ratios(model, batch))).mean()


LOSSES = {"DPO": (dpo_loss, math.log(2)), "KTO": (kto_loss, 0.5)}


def adapted(**settings) -> PeftModel:
    """With dropout by default, which TRL switches off."""
    base = KINDS["llama"].base(**WIDE["llama"])
    return perturb(adapt(base, TARGETS, init_seed=0, **settings))


@pytest.mark.parametrize("trainer", LOSSES)
@pytest.mark.parametrize("method", TRIED)
def test_the_reference_of_a_trained_adapter_is_its_copy(method, trainer, words, tmp_path):
    model = adapted(**METHODS[method])
    plain = without_dropout(copy.deepcopy(model))
    made = preferring(trainer, model, words, tmp_path)
    parameters = dict(model.named_parameters())
    for name in (name for name in parameters if ".default." in name):
        assert parameters[name.replace(".default.", ".ref.")].equal(parameters[name]), name
    batch, step = trained_step(made)

    loss, at_the_start = LOSSES[trainer]
    assert step.output.item() == pytest.approx(at_the_start, abs=1e-5)
    expected = plain_step(plain, batch, loss)
    reference = {name: p for name, p in step.moved.items() if ".ref." in name}
    assert reference and all(moved.abs().max() == 0 for moved in reference.values())
    step.moved = {name: p for name, p in step.moved.items() if ".ref." not in name}
    # In fp32, and TRL sums the vocabulary in pieces.
    assert_same_step(step, expected, bound=1e-3)


@pytest.mark.parametrize("trainer", LOSSES)
@pytest.mark.parametrize("on", ["heads", "input"])
def test_dropout_is_switched_off_in_training_and_not_in_the_file(on, trainer, words, tmp_path):
    model = adapted(lora_dropout=0.5, dropout_on=on).train()
    inputs = KINDS["llama"].inputs()
    assert far(model(**inputs).logits, model(**inputs).logits) > 0.01
    preferring(trainer, model, words, tmp_path)
    assert model.train()(**inputs).logits.equal(model(**inputs).logits)
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert saved["lora_dropout"] == 0.5


# A quantized base


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    sizes = {"hidden_size": 64, "intermediate_size": 128}  # bitsandbytes has blocks of 64
    KINDS["llama"].base(initializer_range=0.2, **sizes).save_pretrained(folder)
    return folder


def in_4_bit(folder: Path) -> nn.Module:
    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    base = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=how, device_map="cpu", dtype=torch.bfloat16
    )
    assert any(isinstance(module, Linear4bit) for module in base.modules())
    return base


def dense(linear: Linear4bit) -> nn.Linear:
    made = nn.Linear(linear.in_features, linear.out_features, bias=False)
    weight = dequantize_4bit(linear.weight.data, linear.weight.quant_state)
    made.weight = nn.Parameter(weight, requires_grad=False)
    return made


def sft_loss(model: nn.Module, batch: dict) -> Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), batch["labels"][:, 1:].flatten())


def sft(base: nn.Module, config, words, folder: Path) -> SFTTrainer:
    texts = [prompt + good for prompt, good in zip(PROMPTS, GOOD, strict=True)]
    return SFTTrainer(
        model=base,
        args=SFTConfig(**settings(folder)),
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=words,
        peft_config=config,
    )


@pytest.mark.parametrize("method", TRIED)
def test_fine_tuning_on_4_bits(method, base_folder, words, tmp_path):
    how = {"lora_dropout": 0.0, "init_seed": 0, "task_type": "CAUSAL_LM"}
    config = RLoraConfig(target_modules=TARGETS, **METHODS[method] | how)
    trainer = sft(in_4_bit(base_folder), config, words, tmp_path)
    perturb(trainer.model, scale=0.05)
    assert {p.dtype for p in trained_of(trainer.model).values()} == {torch.bfloat16}
    # TRL replaces a forward, which a copy of its model would share: the plain one is made anew.
    plain = get_peft_model(in_4_bit(base_folder), config)
    for name, p in adapter_of(trainer.model).items():
        adapter_of(plain)[name].data = p.data.clone()
    full = replaced(copy.deepcopy(plain), Linear4bit, dense).float()
    batch, step = trained_step(trainer)
    # The same operations, but for the last product, which TRL takes in pieces.
    assert_same_step(step, plain_step(plain, batch, sft_loss), bound=1e-3)
    # And what bf16, of 8 bits, leaves of a step in fp32 with the same numbers.
    expected = plain_step(full, batch, sft_loss)
    assert far(step.output, expected.output) < 0.01
    for name, gradient in expected.gradients.items():
        assert far(step.gradients[name], gradient) < 0.15, name


@pytest.mark.parametrize("heads", ["random", "centered"])
def test_the_start_on_4_bits_is_the_base_up_to_bf16(heads, base_folder, words, tmp_path):
    config = RLoraConfig(
        target_modules=TARGETS, init_heads=heads, init_seed=0, task_type="CAUSAL_LM"
    )
    model = sft(in_4_bit(base_folder), config, words, tmp_path).model
    inputs = KINDS["llama"].inputs()
    start = evaluated(model, inputs)
    with model.disable_adapter():
        assert 0 < far(start, evaluated(model, inputs)) < 0.02


# Chapter 11b's ten lines

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def letters() -> PreTrainedTokenizerFast:
    """A tokenizer of bytes with a chat template."""
    alphabet = sorted(ByteLevel.alphabet())
    made = Tokenizer(BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    made.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    special = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, **special)
    tokenizer.chat_template = CHATML
    return tokenizer


def test_the_chapters_ten_lines(tmp_path):
    """They train R-LoRA, and TRL counts the tokens that the chapter's encode_chat counts."""
    tokenizer = letters()
    base = KINDS["llama"].base(vocab_size=len(tokenizer), max_position_embeddings=128)
    chats = [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": good}]
        for prompt, good in zip(PROMPTS, GOOD, strict=True)
    ]
    rows = [{"prompt": chat[:1], "completion": chat[1:]} for chat in chats]
    quiet = {"max_steps": 2, "bf16": False, "disable_tqdm": True, "save_strategy": "no"}
    trainer = ch11b_tools.sft(base, tokenizer, rows, tmp_path, **quiet)
    assert trainer.state.global_step == 2
    trained = {p.dtype for name, p in adapter_of(trainer.model).items() if "rlora_B." in name}
    assert trained == {torch.float32}
    batch = next(iter(trainer.get_eval_dataloader(trainer.train_dataset)))
    for chat, ids, labels in zip(chats, batch["input_ids"], batch["labels"], strict=True):
        wanted = ch11b_tools.encode_chat(tokenizer, chat)
        answer = [i for i in wanted["labels"] if i != -100]
        counted = labels[labels != -100].tolist()
        text = ids[: len(wanted["input_ids"])].tolist()
        assert text == wanted["input_ids"]
        # TRL counts what the template writes behind the end, too: a line break
        assert counted[: len(answer)] == answer
        assert counted[len(answer) :] == tokenizer("\n")["input_ids"]
