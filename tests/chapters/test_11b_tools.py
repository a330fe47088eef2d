"""Chapter 11b: what counts of a chat, mixtures, the worst task, what servers ask of files."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from chapter_code import BOOK, read
from datasets import Dataset
from gguf_file import write_gguf
from lab_helpers import needs_smollm2, write_rows
from peft import LoraConfig, PeftModel, get_peft_model
from rlora_helpers import evaluated, perturb, train
from transformers import AutoModelForCausalLM, AutoTokenizer, EvalPrediction

from rlora_lab.chapters.ch11b_tools import RANKS, by_worst, encode_chat, mixture, ready_for
from rlora_lab.models.bases import load_base, smollm2_folder
from rlora_lab.runs.gradients import first_gradient, measure
from rlora_lab.tasks.strings import Synthetic
from rlora_min import RLoraConfig, export_lora

TEXT = "\n".join(cell.source for cell in read(BOOK / "11b_tools.ipynb").cells)
TURNS = [
    {"role": "user", "content": "Where is a rake?"},
    {"role": "assistant", "content": "In the garden."},
]


# Chats


@needs_smollm2
def test_a_real_template():
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder())
    row = encode_chat(tokenizer, TURNS)
    counted = tokenizer.decode([i for i in row["labels"] if i != -100])
    assert counted == "In the garden.<|im_end|>"
    asked = tokenizer.apply_chat_template(TURNS[:1], add_generation_prompt=True)
    asked = asked if isinstance(asked, list) else asked["input_ids"]
    assert row["input_ids"][: len(asked)] == asked  # what the model reads when it is asked


def test_chats_that_are_refused():
    changing = SimpleNamespace(apply_chat_template=lambda turns, **how: f"{len(turns)} turns")
    with pytest.raises(ValueError, match="writes an answered prompt otherwise"):
        encode_chat(changing, TURNS)
    with pytest.raises(ValueError, match="the last message is the user's"):
        encode_chat(changing, TURNS[:1])


# Tasks


def test_a_mixture_has_ones_own_weights_and_seed():
    pieces = {k: Dataset.from_dict({"task": [k] * n}) for k, n in {"a": 900, "b": 100}.items()}
    drawn, other = (mixture(pieces, weights={"b": 3, "a": 1}, seed=s)["task"][:] for s in (0, 1))
    assert drawn.count("b") / len(drawn) == pytest.approx(0.75, abs=0.06)
    assert drawn.count("a") >= 900 and drawn != other  # each is seen whole


def test_the_worst_task():
    labels = np.array([[-100, -100, 3, 4]] * 3)
    said = np.array([[9, 3, 4, 9], [9, 3, 5, 9], [3, 3, 4, 4]])  # place t says token t + 1
    found = by_worst(["a", "a", "b"])(EvalPrediction(predictions=said, label_ids=labels))
    assert found == {"a": 0.5, "b": 1.0, "worst": 0.5}


# Files


def saved(config, folder: Path) -> PeftModel:
    model = perturb(get_peft_model(load_base("tiny").model, config))
    model.save_pretrained(folder)
    return model


def test_what_servers_would_say(tmp_path):
    targets = ["up_proj", "down_proj"]
    routed = saved(RLoraConfig(r=6, target_modules=targets), tmp_path / "routed")
    said = ready_for(tmp_path / "routed")
    assert said["rank"] is None and "rlora_" in said["why"][0] and "vLLM" in said["why"][1]
    export_lora(routed, tmp_path / "export")
    assert ready_for(tmp_path / "export") == {"rank": 12, "max-lora-rank": 16, "why": []}
    mixed = {"r": 4, "rank_pattern": {"up_proj": 32}, "use_rslora": True}
    saved(LoraConfig(target_modules=targets, **mixed), tmp_path / "mixed")
    said = ready_for(tmp_path / "mixed")
    assert (said["rank"], said["max-lora-rank"]) == (32, 32)
    whys = "one rank .*", r"llama\.cpp scales .*"
    assert all(map(re.fullmatch, whys, said["why"])) and len(said["why"]) == 2
    saved(LoraConfig(r=2, target_modules=targets, modules_to_save=["lm_head"]), tmp_path / "head")
    said = ready_for(tmp_path / "head")
    assert said["max-lora-rank"] == 8 and "modules_to_save" in " ".join(said["why"])
    assert str(list(RANKS)) in TEXT


def test_the_versions_in_the_text_are_those_of_the_tests():
    pins = (BOOK.parent / "tests/integrations/requirements.txt").read_text()
    for package, name in (("trl", "TRL"), ("bitsandbytes",) * 2, ("torchao",) * 2):
        (version,) = re.findall(rf"^{package}==(\S+)", pins, re.M)
        assert f"{name} {version}" in TEXT


def test_an_adapter_on_a_gguf_base(tmp_path):
    """Read as dense, trained, saved, and loaded on the same file read again."""
    write_gguf(tmp_path / "model.gguf")

    def read_base():
        how = {"gguf_file": "model.gguf", "dtype": torch.float32}
        return AutoModelForCausalLM.from_pretrained(tmp_path, **how)

    config = RLoraConfig(target_modules=["gate_proj", "up_proj", "down_proj"], init_seed=0)
    inputs = {"input_ids": torch.arange(8)[None]}
    model = train(get_peft_model(read_base(), config), [inputs] * 2)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(read_base(), tmp_path / "adapter")
    assert torch.equal(evaluated(again, inputs), evaluated(model, inputs))
    with model.disable_adapter():
        assert not torch.equal(evaluated(model, inputs), evaluated(again, inputs))


# The record of first gradients


def test_the_record_of_first_gradients_repeats(tmp_path):
    for name in "ab":
        measure(base="tiny", suite="synthetic", batch=4, seeds=1, out=tmp_path / name)
    first, second = (json.loads((tmp_path / name).read_text()) for name in "ab")
    assert first == second and first["base"] == "tiny" and len(first["records"]) == 4
    lora, *rlora = first["records"]
    assert lora["parts"]["A"] == 0 and "router" not in lora["parts"]
    for one in first["records"]:
        assert sum(v**2 for v in one["parts"].values()) == pytest.approx(one["norm"] ** 2)
        assert 0 < one["module_norm"] <= one["norm"] and one["input_norm"] > 0
    assert rlora[0]["parts"]["router"] > 4 * rlora[2]["parts"]["router"]  # gamma 16 and 256


def test_the_gradient_goes_as_the_formula_says():
    """Without dropout: heads and A by 1 / sqrt(gamma), the router by 1 / gamma."""
    found = []
    for gamma in (16.0, 256.0):
        base = load_base("tiny")
        settings = {"gamma": gamma, "lora_dropout": 0.0, "init_seed": 0}
        model = get_peft_model(base.model, RLoraConfig(target_modules=base.targets, **settings))
        found.append(first_gradient(model, Synthetic(["largest"]).batch(8, 0), 0)["parts"])
    ratios = {part: found[0][part] / found[1][part] for part in found[0]}
    assert ratios == pytest.approx({"A": 4, "B": 4, "router": 16}, rel=1e-3)


# Servers and a harness, over SmolLM2


def moved_adapter(base: Path, folder: Path) -> PeftModel:
    """An adapter off its start, as "adapter" and "export" in a folder."""
    config = RLoraConfig(target_modules=["gate_proj", "up_proj", "down_proj"], init_seed=0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = perturb(get_peft_model(model, config), scale=0.02).eval()
    model.save_pretrained(folder / "adapter")
    export_lora(model, folder / "export")
    return model


TASK = """task: units
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: prompt
doc_to_choice: options
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@needs_smollm2
def test_a_harness_takes_the_export_and_from_python_the_routed_model(tmp_path):
    """lm-eval with a task of one's own: what it reads off a row is what the models say."""
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    rows = [{"prompt": f"{n} and 1 is", "answer": "a", "options": ["a", "b"]} for n in range(3)]
    write_rows(tmp_path / "rows.jsonl", rows)
    (tmp_path / "units.yaml").write_text(TASK.format(rows=tmp_path / "rows.jsonl"))
    base = smollm2_folder()
    routed = moved_adapter(base, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(base)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    exported = PeftModel.from_pretrained(plain, tmp_path / "export").eval()
    found = {}
    for name, model, theirs in (
        ("export", exported, {"pretrained": str(base), "peft": str(tmp_path / "export")}),
        ("routed", routed, {"pretrained": routed, "tokenizer": tokenizer}),
    ):
        scored = lm_eval.simple_evaluate(
            HFLM(**theirs, dtype="float32", device="cpu"),
            tasks=["units"],
            task_manager=TaskManager(include_path=str(tmp_path)),
        )
        found[name] = []
        for row, sample in zip(rows, scored["samples"]["units"], strict=True):
            ids = tokenizer(f"{row['prompt']} a", return_tensors="pt")["input_ids"]
            with torch.no_grad():
                ours = model(input_ids=ids).logits[0, -2].log_softmax(-1)[ids[0, -1]]
            (said, _), _ = sample["filtered_resps"]
            assert said == pytest.approx(ours.item(), abs=1e-3)
            found[name].append(said)
    assert found["export"] != pytest.approx(found["routed"], abs=1e-3)


# llama.cpp: where LLAMA_CPP names a folder of its source, and llama_cpp can be imported


@needs_smollm2
@pytest.mark.skipif("LLAMA_CPP" not in os.environ, reason="LLAMA_CPP names no folder of llama.cpp")
def test_llama_cpp_takes_the_export_and_refuses_the_adapter(tmp_path):
    """Converted by its own scripts; greedy texts are those of PEFT."""
    source = Path(os.environ["LLAMA_CPP"])
    base = smollm2_folder()

    def convert(script: str, *arguments) -> subprocess.CompletedProcess:
        command = [sys.executable, source / script, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True)

    moved_adapter(base, tmp_path)
    adapter = "convert_lora_to_gguf.py", "--base", base, "--outfile"
    refused = convert(*adapter, tmp_path / "no.gguf", tmp_path / "adapter")
    assert refused.returncode and "Not a lora_A or lora_B tensor" in refused.stderr
    taken = convert(*adapter, tmp_path / "export.gguf", tmp_path / "export")
    assert taken.returncode == 0, taken.stderr
    fields = gguf.GGUFReader(tmp_path / "export.gguf")
    assert fields.get_field("adapter.lora.alpha").contents() == 8  # 2 r: the scale is 1
    assert len(fields.tensors) == 2 * 3 * 30
    if find_spec("llama_cpp") is None:
        pytest.skip("the files are converted; llama_cpp is not here to run them")
    import llama_cpp

    made = convert(
        "convert_hf_to_gguf.py", base, "--outtype", "f32", "--outfile", tmp_path / "base.gguf"
    )
    assert made.returncode == 0, made.stderr
    exported = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path / "export"
    )
    tokenizer = AutoTokenizer.from_pretrained(base)
    options = {"n_ctx": 128, "n_threads": 1, "verbose": False, "use_mmap": False}
    bare = llama_cpp.Llama(str(tmp_path / "base.gguf"), **options)
    served = llama_cpp.Llama(
        str(tmp_path / "base.gguf"), lora_path=str(tmp_path / "export.gguf"), **options
    )
    differ = 0
    for prompt in ("The capital of France is", "Two and two are", "A rake is found in the"):
        ids = tokenizer(prompt, return_tensors="pt")
        greedy = {"max_new_tokens": 12, "do_sample": False, "repetition_penalty": 1.0}
        ours = exported.eval().generate(**ids, **greedy)[0, ids["input_ids"].shape[1] :].tolist()
        theirs = []
        for llama in (served, bare):
            llama.reset()
            stream = llama.generate(ids["input_ids"][0].tolist(), temp=0.0, repeat_penalty=1.0)
            theirs.append([token for token, _ in zip(stream, ours, strict=False)])
        assert theirs[0] == ours
        differ += theirs[1] != ours
    assert differ  # the adapter does something
