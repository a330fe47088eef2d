"""Several adapters in one batch: `adapter_names` gives each row its own."""

import pytest
import torch
from peft import TaskType
from rlora_helpers import KINDS, STRICT, VOCABULARY, adapt, evaluated, layers_of, perturb, relative
from transformers import BartConfig, BartForConditionalGeneration

from rlora_min import RLoraConfig, record_routing

pytestmark = STRICT
NAMES = ["default", "two", "__base__", "two", "default"]


def three(kind, **settings):
    """A model with adapters of other settings and targets beside each other."""
    model = perturb(adapt(kind.base(), kind.targets, **settings))
    second = dict(r=2, num_heads=2, router="mean", init_heads="centered")
    model.add_adapter("two", RLoraConfig(target_modules=[kind.targets[0]], **second))
    perturb(model, "two", seed=7)
    return model.eval()


def one_by_one(model, inputs, names):
    """Each row alone, its adapter switched on."""
    rows = []
    for i, name in enumerate(names):
        if isinstance(inputs, dict):
            row = {k: v[i : i + 1] for k, v in inputs.items()}
        else:
            row = inputs[i : i + 1]
        if name == "__base__":
            with model.disable_adapter():
                rows.append(evaluated(model, row))
        else:
            model.set_adapter(name)
            rows.append(evaluated(model, row))
    model.set_adapter("default")
    return torch.cat(rows)


@torch.no_grad()
def mixed(model, inputs, names):
    if isinstance(inputs, dict):
        return model(**inputs, adapter_names=names).logits
    return model(inputs, adapter_names=names)


def test_each_row_has_its_own_adapter(kind):
    model = three(kind, lora_dropout=0.3)
    inputs = kind.inputs(batch=5)
    expected = one_by_one(model, inputs, NAMES)
    output = mixed(model, inputs, NAMES)
    assert relative(output - expected, expected) < 1e-5
    same = [NAMES.index(name) for name in NAMES]
    assert len(set(same)) == 3  # and the three differ
    for i, j in ((0, 1), (0, 2), (1, 2)):
        rows = (
            [kind.inputs(batch=1, seed=3), [NAMES[i]]],
            [kind.inputs(batch=1, seed=3), [NAMES[j]]],
        )
        one, other = (mixed(model, *row) for row in rows)
        assert relative(one - other, one) > 1e-3
    # nothing is left behind
    assert torch.equal(evaluated(model, inputs), evaluated(three(kind, lora_dropout=0.3), inputs))
    assert not any(layer._forward_pre_hooks for layer in layers_of(model))


def test_on_a_bf16_base():
    kind = KINDS["sequential"]
    model = three(kind)
    model.base_model.model.to(torch.bfloat16)
    x = kind.inputs(batch=5, dtype=torch.bfloat16)
    expected = one_by_one(model, x, NAMES)
    output = mixed(model, x, NAMES)
    assert output.dtype == torch.bfloat16
    assert relative(output.float() - expected.float(), expected.float()) < 0.02


def test_saved_modules_go_by_row_too():
    kind = KINDS["sequential"]
    whole = {"modules_to_save": ["4"]}
    model = perturb(adapt(kind.base(), ["0"], **whole))
    model.add_adapter("two", RLoraConfig(target_modules=["0"], **whole))
    perturb(model, "two", seed=7)
    head = model.base_model.model[4].modules_to_save
    with torch.no_grad():
        head["two"].weight += 1
    model.eval()
    x = kind.inputs(batch=5)
    expected = one_by_one(model, x, NAMES)
    assert relative(mixed(model, x, NAMES) - expected, expected) < 1e-5


@pytest.mark.parametrize("num_beams", [1, 3])
def test_generate_and_its_beams(num_beams):
    kind = KINDS["llama"]
    model = three(kind, task_type=TaskType.CAUSAL_LM)
    inputs = kind.inputs(batch=5)
    how = dict(max_new_tokens=6, do_sample=False, num_beams=num_beams)
    together = model.generate(**inputs, adapter_names=NAMES, **how)
    for i, name in enumerate(NAMES):
        row = {k: v[i : i + 1] for k, v in inputs.items()}
        if name == "__base__":
            with model.disable_adapter():
                alone = model.generate(**row, **how)
        else:
            model.set_adapter(name)
            alone = model.generate(**row, **how)
        assert torch.equal(together[i : i + 1], alone), name


def test_beams_of_a_model_with_an_encoder():
    """The encoder sees each row once; only the decoder's rows are repeated for beams."""
    torch.manual_seed(0)
    sizes = dict(d_model=16, encoder_layers=1, decoder_layers=1, vocab_size=VOCABULARY)
    sizes |= dict(encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=32)
    sizes |= dict(encoder_ffn_dim=24, decoder_ffn_dim=24, forced_eos_token_id=None)
    base = BartForConditionalGeneration(BartConfig(**sizes)).eval()
    model = perturb(adapt(base, ["fc1", "q_proj"], task_type=TaskType.SEQ_2_SEQ_LM), scale=1.0)
    model.add_adapter("two", RLoraConfig(target_modules=["fc2"]))
    perturb(model, "two", seed=7, scale=1.0)
    model.eval()
    ids = KINDS["llama"].inputs(batch=3)["input_ids"]
    names = ["two", "default", "__base__"]
    how = dict(max_new_tokens=5, num_beams=2, do_sample=False)
    together = model.generate(input_ids=ids, adapter_names=names, **how)
    for i, name in enumerate(names[:2]):
        model.set_adapter(name)
        alone = model.generate(input_ids=ids[i : i + 1], **how)
        assert torch.equal(together[i : i + 1, : alone.shape[1]], alone), name


def test_routing_is_recorded_of_ones_own_rows_only():
    kind = KINDS["sequential"]
    model = three(kind, router_init="kaiming")
    x = kind.inputs(batch=5)
    rows = [i for i, name in enumerate(NAMES) if name == "default"]
    with record_routing(model) as log:
        evaluated(model, x[rows])
    with record_routing(model) as together:
        together.mask = torch.ones(5, 5)
        mixed(model, x, NAMES)
    assert together.mean["all"].keys() == log.mean["all"].keys() == {"0", "2"}
    for path, mean in log.mean["all"].items():
        assert torch.allclose(together.mean["all"][path], mean, atol=1e-6)
        assert together.entropy["all"][path] == pytest.approx(log.entropy["all"][path], abs=1e-6)
    with record_routing(model) as masked, record_routing(model, "two") as two:
        masked.mask = torch.zeros(5, 5)
        masked.mask[rows[1]] = 1
        mixed(model, x, NAMES)
    with record_routing(model) as last:
        evaluated(model, x[rows[1:]])
    assert torch.allclose(masked.mean["all"]["0"], last.mean["all"]["0"], atol=1e-6)
    assert two.mean["all"]["0"].tolist() == [0.5, 0.5]


def test_what_lora_refuses_is_refused():
    kind = KINDS["sequential"]
    model = three(kind, router="mean")
    x = kind.inputs(batch=5)
    with pytest.raises(ValueError, match="one name for each row, got 2 names for 5 rows"):
        mixed(model, x, NAMES[:2])
    with pytest.raises(ValueError, match=r"No adapters \['three'\].*'default', 'two'.*__base__"):
        mixed(model, x, [*NAMES[:4], "three"])
    with pytest.raises(TypeError, match="must be a list of names, got 'default'"):
        mixed(model, x, "default")
    model.train()
    with pytest.raises(ValueError, match="for inference"):
        mixed(model, x, NAMES)
    model.eval()
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        mixed(model, x, NAMES)
    model.unmerge_adapter()
    mixed(model, x, NAMES)
    assert not any(layer._forward_pre_hooks for layer in layers_of(model))
