"""The Megatron engine on one rank: the update, what is not updated, precision, recomputation, starting weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from nha_megatron.config import ConfigError
from tests.distributed import RankError, RankPool
from tests.engine.programs import full_gradients, make_engine, micro_batches, tiny_config, train


def copies(engine: Any) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in engine.named_parameters()}


def one_update(optimizer: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], float]:
    config = tiny_config(optimizer=optimizer, model={"window": "16,full,0,7", "qkv_bias": True})
    engine = make_engine(config)
    batches = micro_batches(config, engine.layout, 0)
    before = copies(engine)
    engine._accumulate_gradients(batches)
    gradients = full_gradients(engine)
    result = engine.train_step(batches, lr=0.01)
    return before, gradients, copies(engine), result.grad_norm


@pytest.mark.parametrize("clip_grad", [0.5, 0.0], ids=["clipped", "not_clipped"])
def test_update_is_adamw(ranks: RankPool, clip_grad: float) -> None:
    settings = {"weight_decay": 0.2, "clip_grad": clip_grad, "eps": 1e-8}
    ((before, gradients, after, grad_norm),) = ranks.run(1, one_update, optimizer=settings)
    norm = math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients.values()))
    assert grad_norm == pytest.approx(norm, rel=1e-5)
    scale = min(1.0, clip_grad / norm) if clip_grad else 1.0
    assert (scale < 1) == bool(clip_grad)
    for name, weight in before.items():
        gradient = scale * gradients[name]
        full_gate = name == "decoder.layers.1.self_attention.linear_gate.weight"
        decay = 0.0 if weight.dim() == 1 or full_gate else 0.2
        # Adam's first step: both moments are the gradient after bias correction.
        expected = weight * (1 - 0.01 * decay) - 0.01 * gradient / (gradient.abs() + 1e-8)
        # Where the gradient is near eps its own rounding (1e-7 of the largest, ~1) decides; such elements move less than lr.
        sure = gradient.abs() > 1e-4 * gradient.abs().max()
        torch.testing.assert_close(after[name][sure], expected[sure], rtol=1e-4, atol=1e-6, msg=name)
        if full_gate:
            assert not gradients[name].any() and torch.equal(after[name], weight)


def not_finite() -> dict[str, Any]:
    config = tiny_config()
    engine = make_engine(config)
    batches = micro_batches(config, engine.layout, 0)
    weights = dict(engine.named_parameters())
    weights["decoder.final_layernorm.weight"].data[0] = math.inf
    before = copies(engine)
    bad = engine.train_step(batches, 1e-3)
    unchanged = all(torch.equal(before[name], parameter) for name, parameter in engine.named_parameters())
    weights["decoder.final_layernorm.weight"].data[0] = 1.0
    good = engine.train_step(batches, 1e-3)
    return {"bad": bad, "unchanged": unchanged, "good": good}


def test_a_gradient_that_is_not_finite_is_not_applied(ranks: RankPool) -> None:
    (result,) = ranks.run(1, not_finite)
    assert result["bad"].skipped and result["unchanged"]
    assert not result["good"].skipped and math.isfinite(result["good"].loss)


def all_masked() -> None:
    config = tiny_config()
    engine = make_engine(config)
    batches = micro_batches(config, engine.layout, 0)
    for batch in batches:
        batch.loss_mask.zero_()
    engine.train_step(batches, 1e-3)


def test_a_batch_without_counted_tokens_is_refused(ranks: RankPool) -> None:
    with pytest.raises(RankError, match="ConfigError: the global batch has no token that counts"):
        ranks.run(1, all_masked)


def test_grouping_of_rows_into_micro_batches_does_not_matter(ranks: RankPool) -> None:
    """Rows with 6 and with 58 counted tokens weigh by their tokens, not by their micro batch."""
    results = [
        ranks.run(1, train, config=tiny_config(training={"micro_batch_size": size}), steps=2, masks="uneven")[0] for size in (1, 2, 4)
    ]
    for result in results[1:]:
        assert result["tokens"] == results[0]["tokens"]
        assert result["losses"] == pytest.approx(results[0]["losses"], rel=5e-5)  # as in the parity tests
        for name, gradient in results[0]["gradients"].items():
            assert (result["gradients"][name] - gradient).norm() < 5e-6 * gradient.norm().clamp(min=1e-12), name


def loss_after_first_documents(documents: bool) -> list[float]:
    """Loss sum over the tokens from 29 on, before and after the tokens 0-28 change."""
    config = tiny_config(training={"global_batch_size": 1})
    engine = make_engine(config)
    (batch,) = micro_batches(config, engine.layout, 0, documents=documents)
    batch.loss_mask[:, :29] = 0
    before, _ = engine.evaluate([batch])
    batch.tokens[:, :29] = (batch.tokens[:, :29] + 1) % config.model.vocab_size
    after, _ = engine.evaluate([batch])
    return [before, after]


def test_documents_reach_the_attention_layers(ranks: RankPool) -> None:
    ((before, after),) = ranks.run(1, loss_after_first_documents, documents=True)
    assert before == after
    ((before, after),) = ranks.run(1, loss_after_first_documents, documents=False)
    assert before != after


def train_and_describe(config: Any) -> dict[str, Any]:
    engine = make_engine(config)
    results = [engine.train_step(micro_batches(config, engine.layout, step), 1e-3) for step in range(3)]
    inner = engine.optimizer.chained_optimizers[0].optimizer
    return {
        "losses": [result.loss for result in results],
        "skipped": any(result.skipped for result in results),
        "weights": {parameter.dtype for _, parameter in engine.named_parameters()},
        "gradients": {parameter.main_grad.dtype for _, parameter in engine.named_parameters()},
        "optimizer": {parameter.dtype for group in inner.param_groups for parameter in group["params"]},
    }


@pytest.mark.parametrize("parallel", [{}, {"tensor": 2, "sequence": True}, {"pipeline": 2}, {"context": 2}], ids=str)
def test_bf16_trains_close_to_fp32_with_fp32_optimizer_state(ranks: RankPool, parallel: dict[str, Any]) -> None:
    world = 2 if parallel else 1
    (expected,) = ranks.run(1, train_and_describe, config=tiny_config())
    for result in ranks.run(world, train_and_describe, config=tiny_config(parallel=parallel, training={"precision": "bf16"})):
        assert result["weights"] == {torch.bfloat16}
        assert result["gradients"] == result["optimizer"] == {torch.float32}
        assert not result["skipped"]
        # bfloat16 has 8 bits: relative rounding 4e-3 per operation, averaged over 256 tokens of loss.
        assert result["losses"] == pytest.approx(expected["losses"], rel=5e-3)


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize(
    "parallel",
    [
        {},
        {"context": 2},
        pytest.param({"tensor": 2, "sequence": True}, marks=pytest.mark.slow),
        pytest.param({"pipeline": 2, "context": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_recomputation_changes_nothing(ranks: RankPool, recompute: str, parallel: dict[str, Any]) -> None:
    world = math.prod(size for name, size in parallel.items() if name != "sequence")
    expected, result = (
        ranks.run(world, train, config=tiny_config(parallel=parallel, training={"recompute": how}), steps=2)[0]
        for how in ("none", recompute)
    )
    assert result["losses"] == expected["losses"] and result["grad_norms"] == expected["grad_norms"]
    for name, gradient in expected["gradients"].items():
        assert torch.equal(result["gradients"][name], gradient), name


@pytest.mark.parametrize(
    ("world", "parallel", "count"),
    [(1, {}, 3), pytest.param(4, {"pipeline": 2, "virtual_pipeline": 2, "context": 2}, 1, marks=pytest.mark.slow)],
    ids=["one", "pp2_interleaved_cp2"],
)
def test_recomputation_of_some_layers_changes_nothing(ranks: RankPool, world: int, parallel: dict[str, Any], count: int) -> None:
    model = {"window": "16,full,3,7"} if world == 1 else {"num_layers": 8, "window": "16,full,3,7"}
    settings = {"recompute": "full", "recompute_layers": count}
    expected, result = (
        ranks.run(world, train, config=tiny_config(model=model, parallel=parallel, training=training), steps=2)
        for training in ({}, settings)
    )
    for of_rank, wanted in zip(result, expected, strict=True):
        assert of_rank["losses"] == wanted["losses"] and of_rank["grad_norms"] == wanted["grad_norms"]
        for name, gradient in wanted["gradients"].items():
            assert torch.equal(of_rank["gradients"][name], gradient), name


def forwards_of_operator(recompute: str, layers: int | None) -> int:
    """How often the operator runs in one forward and backward of one micro batch."""
    from nha_megatron.layers.nha import layer as layer_module

    config = tiny_config(training={"recompute": recompute, "recompute_layers": layers, "global_batch_size": 1})
    engine = make_engine(config)
    calls = 0
    original = layer_module.hybrid_attention

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return original(*args, **kwargs)

    layer_module.hybrid_attention = counted
    try:
        engine.train_step(micro_batches(config, engine.layout, 0), 1e-3)
    finally:
        layer_module.hybrid_attention = original
    return calls


@pytest.mark.parametrize(
    ("recompute", "layers", "expected"), [("none", None, 4), ("selective", None, 8), ("full", None, 8), ("full", 3, 7), ("full", 4, 8)]
)
def test_recomputation_happens(ranks: RankPool, recompute: str, layers: int | None, expected: int) -> None:
    assert ranks.run(1, forwards_of_operator, recompute=recompute, layers=layers) == [expected]


def take_weights(parallel: dict[str, Any], weights: dict[str, Tensor]) -> list[float]:
    config = tiny_config(parallel=parallel, training={"seed": 99})
    engine = make_engine(config)
    engine.load_weights(weights)
    return [engine.train_step(micro_batches(config, engine.layout, step), 1e-3).loss for step in range(2)]


def test_weights_from_elsewhere_are_sliced_for_the_layout(ranks: RankPool) -> None:
    (origin,) = ranks.run(1, train, config=tiny_config(), steps=2)
    for losses in ranks.run(4, take_weights, parallel={"tensor": 2, "pipeline": 2}, weights=origin["weights"]):
        # As in the parity tests; two steps, so that the optimizer is seen to start from these weights too.
        assert losses == pytest.approx(origin["losses"], rel=5e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("output_layer.weight"), "have no tensor 'output_layer.weight'"),
        (
            lambda weights: weights.update({"output_layer.weight": torch.zeros(3, 3)}),
            r"is \(3, 3\), the configuration makes it \(128, 64\)",
        ),
    ],
    ids=["missing", "shape"],
)
def test_weights_that_do_not_fit_are_refused(ranks: RankPool, change: Any, message: str) -> None:
    (origin,) = ranks.run(1, train, config=tiny_config(), steps=1)
    change(origin["weights"])
    with pytest.raises(RankError, match=f"{ConfigError.__name__}: .*{message}"):
        ranks.run(1, take_weights, parallel={}, weights=origin["weights"])
