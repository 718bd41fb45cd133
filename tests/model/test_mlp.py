"""SwiGLU that keeps its input alone: the same bits as autograd's, forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nha_megatron.model.mlp import swiglu
from tests.distributed import RankPool
from tests.engine.programs import make_engine, micro_batches, tiny_config


def by_autograd(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_it_is_the_formula_bit_for_bit(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, d_out = (3 * torch.randn(7, 2, width, generator=generator).to(dtype) for width in (22, 11))
    results = []
    for function in (swiglu, by_autograd):
        leaf = x.clone().requires_grad_()
        out = function(leaf)
        results.append((out, *torch.autograd.grad(out, leaf, d_out)))
    for given, wanted in zip(*results, strict=True):
        assert torch.equal(given, wanted)


def test_gradient_by_finite_differences() -> None:
    assert torch.autograd.gradcheck(swiglu, (torch.randn(3, 8, dtype=torch.float64, requires_grad=True),))


def kept_by_the_mlp() -> tuple[int, int]:
    """Elements that the MLP of a layer keeps a token, weights aside; and one forward and backward of the whole model through it."""
    config = tiny_config(training={"global_batch_size": 1})
    engine = make_engine(config)
    mlp = engine.model_chunks[0].module.decoder.layers[0].mlp
    weights = {parameter.data_ptr() for parameter in mlp.parameters()}
    kept = {}

    def keep(x: Tensor) -> Tensor:
        if x.data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // x.element_size()
        return x

    hidden = torch.randn(16, 1, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out, bias = mlp(hidden)
    assert bias is None and out.shape == hidden.shape
    engine.train_step(micro_batches(config, engine.layout, 0), 1e-3)
    return sum(kept.values()) // 16, config.model.ffn_hidden_size


def test_the_mlp_keeps_its_input_gate_up_and_product(ranks: RankPool) -> None:
    ((kept, ffn),) = ranks.run(1, kept_by_the_mlp)
    assert kept == 64 + 3 * ffn


def test_second_derivatives_of_swiglu() -> None:
    gate_up = torch.randn(3, 8, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradgradcheck(swiglu, gate_up)
