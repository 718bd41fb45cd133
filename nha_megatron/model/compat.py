"""What differs between megatron-core 0.16.1 (Python 3.11) and 0.19.2 (Python 3.12), in one place.

The rest of the package is written against what both accept: constructors of ours take `**_` for keywords that newer versions add,
and layers come from a list of `ModuleSpec`s.

| topic | 0.16.1 | 0.19.2 | here |
|---|---|---|---|
| norms in a layer spec | a class or spec, built | called | a class serves both |
| MLP in a layer spec | `ModuleSpec`, `build_module` | called; `MLP.as_mlp_submodule` | `mlp_spec` |
| tensor-parallel marks of weights that Megatron does not initialise | absent | present | `mark_tensor_parallel_weights` |
| GPTModel after the layers, `_postprocess` | keywords | more keywords | `language_model.py` takes two, passes the rest on |
| planning a save | no strategy to name | `async_strategy="mcore"` | `checkpoint/shards.py` |
| state that all ranks share | `common.pt` | an object like others | `checkpoint/shards.py`: `common.pt`, which both read |
| loading torch Adam state in the `fully_reshardable` format | KeyError: 'step' | the same | `engine/megatron/checkpoint_workarounds.py` |
"""

from __future__ import annotations

import functools
from typing import Any

from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import nn

from nha_megatron.model.mlp import GatedMLP


def mlp_spec(submodules: MLPSubmodules) -> Any:
    """The `mlp` entry of a transformer layer's submodules."""
    if hasattr(GatedMLP, "as_mlp_submodule"):
        return functools.partial(GatedMLP.as_mlp_submodule, submodules=submodules)
    return ModuleSpec(module=GatedMLP, submodules=submodules)


def mark_tensor_parallel_weights(model: nn.Module) -> None:
    """Marks sharded weights with the dimension they are split along, where Megatron has not.

    With `perform_initialization=False` 0.16.1 leaves the marks out, and the gradient norm then counts only the shards of TP rank 0.
    """
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if weight is None or hasattr(weight, "tensor_model_parallel"):
            continue
        if isinstance(module, (ColumnParallelLinear, VocabParallelEmbedding)):
            set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=0, stride=1)
        elif isinstance(module, RowParallelLinear):
            set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=1, stride=1)
    for module in model.modules():
        if isinstance(module, MLP) and module.config.gated_linear_unit:
            # A shard holds its rows of the gate half and then its rows of the up half.
            module.linear_fc1.weight.partition_stride = 2
