"""The methods by name: what they are, and that their sizes are equal."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model_state_dict

from rlora_lab.bases import load_base
from rlora_lab.errors import LabError
from rlora_lab.methods import (
    METHODS,
    adapt,
    adapter_config,
    count_trainable,
    equal_lora_rank,
    equal_mlora_rank,
    rlora_size,
    target_shapes,
)
from rlora_lab.tasks import Synthetic

widths, small = st.integers(1, 4000), st.integers(1, 16)


@given(d_in=widths, d_out=widths, r=small, heads=small)
def test_no_lora_rank_comes_closer(d_in: int, d_out: int, r: int, heads: int):
    def off(rank: int) -> int:
        return abs(rank * (d_in + d_out) - rlora_size(d_in, d_out, r, heads))

    rank = equal_lora_rank(d_in, d_out, r, heads)
    assert rank >= 1 and off(rank) <= off(rank + 1)
    assert rank == 1 or off(rank) <= off(rank - 1)


@given(shapes=st.lists(st.tuples(widths, widths), min_size=1, max_size=5), r=small, heads=small)
def test_no_mlora_rank_comes_closer(shapes: list[tuple[int, int]], r: int, heads: int):
    wanted = sum(rlora_size(i, o, r, heads) for i, o in shapes)

    def off(rank: int) -> int:
        return abs(rank * sum(i + heads * o for i, o in shapes) - wanted)

    rank = equal_mlora_rank(dict(enumerate(shapes)), r, heads)
    assert rank >= 1 and off(rank) <= off(rank + 1)
    assert rank == 1 or off(rank) <= off(rank - 1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("r, heads", [(4, 3), (2, 5)])
def test_counted_size_is_the_formula(method: str, r: int, heads: int):
    base = load_base("tiny")
    shapes = target_shapes(base)
    wanted = sum(rlora_size(*shape, r, heads) for shape in shapes.values())
    if method == "lora":
        size = sum(equal_lora_rank(i, o, r, heads) * (i + o) for i, o in shapes.values())
    elif method == "mlora":
        rank = equal_mlora_rank(shapes, r, heads)
        size = sum(rank * (i + heads * o) for i, o in shapes.values())
    else:
        size = wanted
    model = adapt(method, base, Synthetic(), seed=0, r=r, num_heads=heads)
    assert count_trainable(model) == (size, 0)
    assert abs(size / wanted - 1) < {"lora": 0.05, "mlora": 0.15}.get(method, 1e-12)


def test_minilm_lora_is_exactly_equal():
    config = adapter_config("lora", load_base("minilm"))
    assert isinstance(config, LoraConfig) and config.use_rslora
    ranks = {path.split(".", 3)[3]: rank for path, rank in config.rank_pattern.items()}
    assert ranks == {"intermediate.dense": 11, "output.dense": 8}
    assert rlora_size(384, 1536, 4, 3) == 11 * (384 + 1536)
    assert rlora_size(1536, 384, 4, 3) == 8 * (384 + 1536)


def test_what_the_methods_are():
    def facts(method: str) -> tuple:
        config = adapter_config(method, load_base("tiny"))
        assert config.use_rslora and config.lora_dropout == 0.1 and config.lora_alpha == 32
        return config.init_heads, config.dropout_on, config.router, config.router_init

    assert facts("rlora") == ("random", "heads", "softmax", "zeros")
    assert facts("mlora")[:3] == ("random", "heads", "mean")
    assert facts("hydralora") == ("zeros", "input", "softmax", "kaiming")
    assert facts("hydralora+dropout") == ("zeros", "heads", "softmax", "kaiming")
    assert facts("hydralora+init") == ("random", "input", "softmax", "zeros")
    with pytest.raises(LabError, match="'dora'.*lora, hydralora.*rlora"):
        adapter_config("dora", load_base("tiny"))


@pytest.mark.parametrize("method", METHODS)
def test_adapt_starts_at_the_base_and_repeats_by_seed(method: str):
    suite = Synthetic()
    ids = suite.batch(8, 0)["input_ids"]
    with torch.no_grad():
        expected = load_base("tiny").model(input_ids=ids).logits
        models = [adapt(method, load_base("tiny"), suite, seed=s).eval() for s in (1, 1, 2)]
        for model in models:
            off = (model(input_ids=ids).logits - expected).abs().max()
            assert off <= 1e-5 * expected.abs().max()
    a, b, c = (get_peft_model_state_dict(model) for model in models)
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not all(torch.equal(a[key], c[key]) for key in a)
