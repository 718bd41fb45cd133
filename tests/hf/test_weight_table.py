"""The table of weights: both directions, its layouts, and what it refuses."""

import pytest
import torch
from torch import Tensor

from nha_megatron.config import ConfigError, ModelConfig
from nha_megatron.hf import weight_table
from nha_megatron.hf.families.nha.family import FAMILY
from nha_megatron.layers.hugging_face import split_gate_up, split_qkv
from tests.hf.hf_cases import VARIANTS, hf_model, random_weights, tiny_model


def to_hf(weights: dict[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    return weight_table.to_hf(weights, FAMILY.entries(model), model)


def from_hf(weights: dict[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    return weight_table.from_hf(weights, FAMILY.entries(model), model)


@pytest.mark.parametrize("variant", VARIANTS)
def test_export_then_import_gives_the_same_weights(variant: str) -> None:
    model = tiny_model(**VARIANTS[variant])
    weights = random_weights(model)
    restored = from_hf(to_hf(weights, model), model)
    assert restored.keys() == weights.keys()
    assert all(torch.equal(restored[name], weights[name]) for name in weights)


@pytest.mark.parametrize("variant", VARIANTS)
def test_import_then_export_gives_the_same_weights(variant: str) -> None:
    model = tiny_model(**VARIANTS[variant])
    theirs = to_hf(random_weights(model, seed=1), model)
    restored = to_hf(from_hf(theirs, model), model)
    assert restored.keys() == theirs.keys()
    assert all(torch.equal(restored[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("variant", VARIANTS)
def test_table_names_exactly_the_parameters_of_the_hugging_face_model(variant: str) -> None:
    model = tiny_model(**VARIANTS[variant])
    parameters = dict(hf_model(model).named_parameters())  # tied weights appear once
    mapped = to_hf(random_weights(model), model)
    assert {name: tuple(tensor.shape) for name, tensor in mapped.items()} == {name: tuple(p.shape) for name, p in parameters.items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameter_count_is_the_one_that_the_configuration_predicts(variant: str) -> None:
    model = tiny_model(**VARIANTS[variant])
    padding = (model.padded_vocab_size - model.vocab_size) * model.hidden_size * (1 if model.tie_embeddings else 2)
    ours = sum(weight.numel() for weight in random_weights(model).values())
    assert ours - padding == sum(p.numel() for p in hf_model(model).parameters())


def test_qkv_rows_are_grouped_by_kv_head() -> None:
    model = tiny_model()  # 4 query heads, 2 KV heads, head_dim 8
    rows = torch.arange(8 * (4 + 2 + 2))
    q, k, v = split_qkv(rows, model)
    head = rows.view(8, 8)  # Megatron's order of heads: q0 q1 k0 v0 q2 q3 k1 v1
    assert torch.equal(q, head[[0, 1, 4, 5]].flatten())
    assert torch.equal(k, head[[2, 6]].flatten())
    assert torch.equal(v, head[[3, 7]].flatten())


def test_gate_stands_before_up() -> None:
    gate, up = split_gate_up(torch.arange(6), tiny_model())
    assert gate.tolist() == [0, 1, 2] and up.tolist() == [3, 4, 5]


def test_vocabulary_padding_is_dropped_and_comes_back_as_zeros() -> None:
    model = tiny_model()
    weights = random_weights(model)
    weights["output_layer.weight"][model.vocab_size :] = 7.0
    theirs = to_hf(weights, model)
    assert theirs["lm_head.weight"].shape[0] == model.vocab_size
    assert not from_hf(theirs, model)["output_layer.weight"][model.vocab_size :].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("decoder.layers.1.mlp.linear_fc1.weight"), "lacks 1 weight.*decoder.layers.1.mlp.linear_fc1.weight"),
        (lambda w: w.update({"decoder.layers.3.input_layernorm.weight": torch.ones(32)}), "beyond what the configuration describes"),
        (lambda w: w.update({"decoder.final_layernorm.weight": torch.ones(31)}), r"shape \(31,\), the configuration says \(32,\)"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change, message: str) -> None:
    model = tiny_model()
    weights = random_weights(model)
    change(weights)
    with pytest.raises(ConfigError, match=message):
        to_hf(weights, model)


def test_import_refuses_a_weight_of_another_shape() -> None:
    model = tiny_model()
    theirs = to_hf(random_weights(model), model)
    # As many elements as k_proj should have, so that only a check of the shape can tell.
    theirs["model.layers.0.self_attn.k_proj.weight"] = theirs["model.layers.0.self_attn.k_proj.weight"].reshape(8, 64)
    with pytest.raises(ConfigError, match=r"k_proj.weight has shape \(8, 64\)"):
        from_hf(theirs, model)


def test_table_has_every_name_once() -> None:
    table = FAMILY.entries(tiny_model(**VARIANTS["converted"]))
    ours = [entry.ours for entry in table]
    theirs = [name for entry in table for name in entry.theirs]
    assert len(ours) == len(set(ours)) and len(theirs) == len(set(theirs))
