"""Initial weights: a function of seed and parameter name, with the documented distribution."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nha_megatron.model.initialize import parameter_seed
from tests.distributed import RankPool
from tests.engine.programs import make_engine, tiny_config

OPTIONS = {"qkv_bias": True, "qk_norm": "rms", "init_std": 0.02}


def weights(seed: int = 7) -> dict[str, Tensor]:
    engine = make_engine(tiny_config(model=OPTIONS, training={"seed": seed}))
    return {name: parameter.detach().clone() for name, parameter in engine.named_parameters()}


@pytest.fixture(scope="module")
def initial(ranks: RankPool) -> dict[str, Tensor]:
    return ranks.run(1, weights)[0]


def test_seed_of_a_parameter_is_stable() -> None:
    """Written down: another value here would change every model that was ever started from a seed."""
    assert parameter_seed(0, "output_layer.weight") == 7474972780136518449
    assert parameter_seed(1, "output_layer.weight") != parameter_seed(0, "output_layer.weight")


def test_norms_are_one_and_biases_zero(initial: dict[str, Tensor]) -> None:
    vectors = {name: tensor for name, tensor in initial.items() if tensor.dim() == 1}
    # Per layer: two boundary norms, query and key norm, output norm, qkv bias. Then the final norm.
    assert len(vectors) == 4 * 6 + 1
    for name, tensor in vectors.items():
        assert tensor.eq(0.0 if name.endswith("bias") else 1.0).all(), name


def test_standard_deviations(initial: dict[str, Tensor]) -> None:
    for name, tensor in initial.items():
        if tensor.dim() == 2:
            expected = 0.02 / math.sqrt(2 * 4) if "linear_proj" in name or "linear_fc2" in name else 0.02
            drawn = tensor[:100] if "embedding" in name or "output_layer" in name else tensor
            # A sample deviation is off by 1 / sqrt(2 n), n >= 768 numbers here: 2.6 %; four times that.
            assert drawn.std().item() == pytest.approx(expected, rel=0.1), name
            assert abs(drawn.mean().item()) < 4 * expected / math.sqrt(drawn.numel()), name


def test_rows_of_the_padded_vocabulary_are_zero(initial: dict[str, Tensor]) -> None:
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        assert initial[name].shape[0] == 128
        assert not initial[name][100:].any() and initial[name][:100].any(dim=1).all()


def test_every_parameter_is_drawn_by_itself(initial: dict[str, Tensor]) -> None:
    first, second = (initial[f"decoder.layers.{i}.self_attention.linear_qkv.weight"] for i in (0, 1))
    assert not torch.equal(first, second)


def test_another_seed_is_another_model(ranks: RankPool, initial: dict[str, Tensor]) -> None:
    (other,) = ranks.run(1, weights, seed=8)
    assert all(not torch.equal(other[name], tensor) for name, tensor in initial.items() if tensor.dim() == 2)
