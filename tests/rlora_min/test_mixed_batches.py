"""Several adapters in one batch: `adapter_names` gives each row its own."""

from functools import partial

import pytest
import torch
from peft import TaskType
from rlora_helpers import (
    LLAMA,
    SEQUENTIAL,
    STRICT,
    VOCABULARY,
    adapt,
    evaluated,
    layers_of,
    output,
    perturb,
    relative,
)
from torch.testing import assert_close
from transformers import BartConfig, BartForConditionalGeneration

from rlora_min import RLoraConfig, record_routing

pytestmark = STRICT
NAMES = ["default", "two", "__base__", "default", "two"]


def three(kind, **settings):
    """A model with adapters of other settings and targets beside each other."""
    model = perturb(adapt(kind.base(), kind.targets, **settings))
    second = dict(r=2, num_heads=2, router="mean", init_heads="centered")
    model.add_adapter("two", RLoraConfig(target_modules=[kind.targets[0]], **second))
    perturb(model, "two", seed=7)
    return model.eval()


def one_by_one(model, inputs, run=evaluated):
    """Each row alone, with its adapter of NAMES switched on."""
    rows = []
    for i, name in enumerate(NAMES):
        if torch.is_tensor(inputs):
            row = inputs[i : i + 1]
        else:
            row = {key: value[i : i + 1] for key, value in inputs.items()}
        if name == "__base__":
            with model.disable_adapter():
                rows.append(run(model, row))
        else:
            model.set_adapter(name)
            rows.append(run(model, row))
    model.set_adapter("default")
    return rows


@torch.no_grad()
def mixed(model, inputs, names):
    return output(partial(model, adapter_names=names), inputs)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_each_row_has_its_own_adapter(kind, dtype, bound):
    model = three(kind, lora_dropout=0.3)
    model.base_model.model.to(dtype)
    inputs = kind.inputs(batch=5, dtype=dtype)
    alone = evaluated(model, inputs)
    expected = torch.cat(one_by_one(model, inputs))
    together = mixed(model, inputs, NAMES)
    assert together.dtype == dtype
    assert relative((together - expected).float(), expected.float()) < bound
    same = kind.inputs(batch=1, seed=3, dtype=dtype)
    rows = [mixed(model, same, [name]) for name in NAMES[:3]]  # and the three differ
    for one, other in (rows[:2], rows[1:], rows[::2]):
        assert relative((one - other).float(), one.float()) > 1e-3
    # nothing is left behind
    assert torch.equal(evaluated(model, inputs), alone)
    assert not any(layer._forward_pre_hooks for layer in layers_of(model))


def test_saved_modules_go_by_row_too():
    whole = {"modules_to_save": ["4"]}
    model = perturb(adapt(SEQUENTIAL.base(), ["0"], **whole))
    model.add_adapter("two", RLoraConfig(target_modules=["0"], **whole))
    perturb(model, "two", seed=7)
    head = model.base_model.model[4].modules_to_save
    with torch.no_grad():
        head["two"].weight += 1
    model.eval()
    x = SEQUENTIAL.inputs(batch=5)
    expected = torch.cat(one_by_one(model, x))
    assert relative(mixed(model, x, NAMES) - expected, expected) < 1e-5


def with_an_encoder():
    """It sees each row once; only the decoder's rows are repeated for beams."""
    torch.manual_seed(0)
    sizes = dict(d_model=16, encoder_layers=1, decoder_layers=1, vocab_size=VOCABULARY)
    sizes |= dict(encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=32)
    sizes |= dict(encoder_ffn_dim=24, decoder_ffn_dim=24, forced_eos_token_id=None)
    base = BartForConditionalGeneration(BartConfig(**sizes)).eval()
    model = perturb(adapt(base, ["fc1", "q_proj"], task_type=TaskType.SEQ_2_SEQ_LM), scale=1.0)
    model.add_adapter("two", RLoraConfig(target_modules=["fc2"]))
    return perturb(model, "two", seed=7, scale=1.0).eval()


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("encoder", [False, True])
def test_generate_and_its_beams(encoder, num_beams):
    model = with_an_encoder() if encoder else three(LLAMA, task_type=TaskType.CAUSAL_LM)
    inputs = LLAMA.inputs(batch=5)
    how = dict(max_new_tokens=6, do_sample=False, num_beams=num_beams)

    def generated(model, row):
        return model.generate(**row, **how)

    together = model.generate(**inputs, adapter_names=NAMES, **how)
    for i, alone in enumerate(one_by_one(model, inputs, generated)):
        assert torch.equal(together[i : i + 1, : alone.shape[1]], alone), NAMES[i]


def test_routing_is_recorded_of_ones_own_rows_only():
    model = three(SEQUENTIAL, router_init="kaiming")
    x = SEQUENTIAL.inputs(batch=5)
    rows = [i for i, name in enumerate(NAMES) if name == "default"]
    with record_routing(model) as log:
        evaluated(model, x[rows])
    with record_routing(model) as together, record_routing(model, "two") as two:
        together.mask = torch.ones(5, 5)
        mixed(model, x, NAMES)
    assert_close(together.mean, log.mean, rtol=1e-5, atol=1e-6)
    assert_close(together.entropy, log.entropy, rtol=0, atol=1e-6)
    assert two.mean["all"]["0"].tolist() == [0.5, 0.5]
    with record_routing(model) as masked:
        masked.mask = torch.zeros(5, 5)
        masked.mask[rows[1]] = 1
        mixed(model, x, NAMES)
    with record_routing(model) as last:
        evaluated(model, x[rows[1:]])
    assert torch.allclose(masked.mean["all"]["0"], last.mean["all"]["0"], atol=1e-6)


def test_what_lora_refuses_is_refused():
    model = three(SEQUENTIAL, router="mean")
    x = SEQUENTIAL.inputs(batch=5)
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
