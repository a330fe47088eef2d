"""Heads that are told the task, one each: what routing could bring at best, as a PEFT type.

    h(x) = W0 x + (alpha / sqrt(r)) B_task A D(x)

A is shared, each task has a head of its own, and nothing has to be learned to find it. Heads start
at zero and dropout D sits on x, as in LoRA.
"""

from contextvars import ContextVar
from dataclasses import dataclass

import peft
import torch.nn.functional as F
from torch import Tensor

from rlora_min import RLoraConfig, RLoraLayer, RLoraModel
from rlora_min.rlora import RLoraType

from ..errors import LabError

TASKS: ContextVar[Tensor | None] = ContextVar("TASKS", default=None)
"""The task of each row that is being computed, (n,): `rlora_lab.models.answers` sets it."""


@dataclass
class OracleConfig(RLoraConfig):
    """`RLoraConfig` with a head for each task; wrong settings are a ValueError."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = RLoraType("ORACLE")
        if (self.init_heads, self.dropout_on, self.router) != ("zeros", "input", "mean"):
            raise ValueError(
                "The oracle needs init_heads='zeros', dropout_on='input', router='mean'."
            )


class OracleLayer(RLoraLayer):
    """An `RLoraLayer` in which each row goes through the head of its task."""

    def _update(self, x: Tensor, adapter_name: str) -> Tensor:
        """(n, tokens, d_in) -> (n, tokens, d_out)"""
        tasks = TASKS.get()
        if tasks is None:
            raise LabError("the oracle has to be told the task of each row")
        config = self.configs[adapter_name]
        A, B = self.rlora_A[adapter_name].weight, self.rlora_B[adapter_name].weight
        x = self.rlora_dropout[adapter_name](self._cast_input_dtype(x, A.dtype))
        down = F.linear(x, A)  # (n, tokens, r)
        g = F.one_hot(tasks, config.num_heads).to(down)[:, None, :, None]  # (n, 1, N, 1)
        return F.linear((config.scaling * g * down.unsqueeze(-2)).flatten(-2), B)


class OracleModel(RLoraModel):
    """The tuner of `OracleConfig`."""

    tuner_layer_cls = OracleLayer


peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING["ORACLE"] = OracleConfig
peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING["ORACLE"] = OracleModel
peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING["ORACLE"] = OracleModel.prefix
