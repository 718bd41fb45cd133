"""The torch backend against the token-by-token oracle, and the oracle against what can be stated independently of it."""

import pytest
import torch
from torch.nn import functional as F

from nha_kernels import AttentionOptions, attention_statistics, nha_attention
from tests.kernels.operator_cases import ROPE, assert_same, boundaries, forward_and_gradients, random_inputs, relative_error

EXACT = 1e-11  # float64 against float64 over sums of up to some hundred terms: rounding is about 1e-14, cancellation costs a few digits
T = 67  # odd, four chunks and a bit


@pytest.mark.parametrize("window", [0, 1, 7, 64, T, 2 * T, None])
@pytest.mark.parametrize("empty_slots", ["attend", "mask", "weight"])
def test_torch_equals_reference(window: int | None, empty_slots: str) -> None:
    assert_same(random_inputs(T, batch=2), EXACT, window=window, empty_slots=empty_slots, rope=ROPE)


@pytest.mark.parametrize(("heads", "kv_heads", "slots"), [(2, 2, 7), (4, 1, 12), (8, 2, 1)])
def test_grouped_query_heads_and_odd_slot_counts(heads: int, kv_heads: int, slots: int) -> None:
    assert_same(random_inputs(37, heads=heads, kv_heads=kv_heads, slots=slots), EXACT, window=7, rope=ROPE)


@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 129])
def test_lengths_around_the_chunk(tokens: int) -> None:
    assert_same(random_inputs(tokens), EXACT, window=5, rope=ROPE)


@pytest.mark.parametrize("window", [0, 1, 7, 64, None])
@pytest.mark.parametrize("empty_slots", ["attend", "mask", "weight"])
@pytest.mark.parametrize("cu_seqlens", [(0, 1, 20, 21, 37, T), (0, 0, 33, 33, T), (0, 16, 32, T, T)], ids=["short", "empty", "edges"])
def test_packed_documents(window: int | None, empty_slots: str, cu_seqlens: tuple[int, ...]) -> None:
    assert_same(random_inputs(T), EXACT, window=window, empty_slots=empty_slots, rope=ROPE, cu_seqlens=boundaries(*cu_seqlens))


def test_packed_documents_equal_separate_sequences() -> None:
    inputs = random_inputs(T)
    packed = nha_attention(*inputs.tensors, window=7, rope=ROPE, cu_seqlens=boundaries(0, 20, 21, T), backend="torch")
    parts = [nha_attention(*inputs.part(slice(a, b)), window=7, rope=ROPE, backend="torch") for a, b in [(0, 20), (20, 21), (21, T)]]
    assert relative_error(packed, torch.cat(parts, 1)) <= EXACT


@pytest.mark.parametrize("window", [0, 3, 40])
def test_documents_are_isolated_bit_for_bit(window: int) -> None:
    """Any change in one document leaves outputs and gradients of the others unchanged to the last bit."""
    results = []
    for seed in (1, 2):
        inputs, other = random_inputs(T, dtype=torch.float32), random_inputs(T, dtype=torch.float32, seed=seed)
        for mine, theirs in zip(inputs.tensors, other.tensors, strict=True):
            mine.data[:, 20:45] = 3 * theirs.data[:, 20:45]
        results.append(forward_and_gradients(inputs, "torch", window=window, rope=ROPE, cu_seqlens=boundaries(0, 20, 45, T))[0])
    for name in results[0]:
        a, b = results[0][name], results[1][name]
        assert torch.equal(a[:, :20], b[:, :20]) and torch.equal(a[:, 45:], b[:, 45:]), name
    assert not torch.equal(results[0]["out"][:, 20:45], results[1]["out"][:, 20:45])


@pytest.mark.parametrize("empty_slots", ["mask", "weight"])
@pytest.mark.parametrize("window", [T, 2 * T, None])
def test_wide_window_is_causal_softmax_attention(empty_slots: str, window: int | None) -> None:
    inputs = random_inputs(T, batch=2)
    q, k, v = (x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))
    wanted = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    for backend in ("torch", "reference"):
        out = nha_attention(*inputs.tensors, window=window, empty_slots=empty_slots, backend=backend)
        assert relative_error(out, wanted) <= EXACT


def test_full_attention_with_attending_empty_slots_is_scaled_by_a_sigmoid() -> None:
    """M zero-logit rows multiply softmax attention's output by sigmoid(lse - log M)."""
    inputs = random_inputs(T, heads=2)
    logits = torch.einsum("bthk,bshk->bhts", inputs.q, inputs.k) * 12**-0.5
    logits = logits.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
    shrink = torch.sigmoid(logits.logsumexp(-1) - torch.log(torch.tensor(5.0, dtype=torch.float64)))
    wanted = torch.einsum("bhts,bshv->bthv", logits.softmax(-1) * shrink[..., None], inputs.v)
    out = nha_attention(*inputs.tensors, window=None, empty_slots="attend", backend="torch")
    assert relative_error(out, wanted) <= EXACT


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_unused_gates_have_a_zero_gradient(backend: str) -> None:
    """Not none: gradient reduction over ranks would wait for it for ever."""
    inputs = random_inputs(9)
    out = nha_attention(*inputs.tensors, window=None, backend=backend)
    (gradient,) = torch.autograd.grad(out.sum(), [inputs.g])
    assert torch.count_nonzero(gradient) == 0


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize(("batch", "tokens"), [(0, 9), (2, 0), (0, 0)])
def test_nothing_to_attend_to_gives_nothing_and_stays_in_the_graph(batch: int, tokens: int, backend: str) -> None:
    for window in (0, 4, None):
        inputs = random_inputs(tokens, batch=batch).tensors
        out, memory = nha_attention(*inputs, window=window, return_memory=True, backend=backend)
        assert out.shape == (batch, tokens, 4, 8) and memory.length.shape == (batch,)
        for x, gradient in zip(inputs, torch.autograd.grad(out.sum(), inputs), strict=True):
            assert gradient.shape == x.shape
        assert nha_attention(*inputs, window=window, memory=memory, backend=backend).shape == out.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("empty_slots", ["attend", "mask", "weight"])
@pytest.mark.parametrize("window", [0, 7])
def test_extreme_gates_stay_finite_and_equal(dtype: torch.dtype, empty_slots: str, window: int) -> None:
    """z = +-200: decay 1 with strength 0, and decay exp(-25) at once; mixed from token to token and slot to slot."""
    inputs = random_inputs(T, dtype=dtype)
    signs = torch.where(torch.rand(inputs.g.shape, generator=torch.Generator().manual_seed(3)) < 0.5, -1.0, 1.0)
    inputs.g = (F.logsigmoid(200.0 * signs.to(inputs.g.dtype)) / 8).requires_grad_()
    # float32: products of about 50 terms, each rounded at 6e-8
    assert_same(inputs, EXACT if dtype == torch.float64 else 2e-5, window=window, empty_slots=empty_slots, rope=ROPE)
    results, _ = forward_and_gradients(inputs, "torch", window=window, empty_slots=empty_slots)
    assert all(torch.isfinite(value).all() for value in results.values())


def test_gates_below_the_clamp_and_no_mass_at_all() -> None:
    inputs = random_inputs(33, dtype=torch.float32)
    inputs.g = torch.full_like(inputs.g, -1e30).requires_grad_()  # forgets everything but the last token
    results, _ = forward_and_gradients(inputs, "torch", window=0)
    assert all(torch.isfinite(value).all() for value in results.values())
    inputs.g = torch.zeros_like(inputs.g).requires_grad_()  # writes nothing: with `weight` and no window nobody holds mass
    results, _ = forward_and_gradients(inputs, "torch", window=0, empty_slots="weight")
    assert torch.count_nonzero(results["out"]) == 0 and all(torch.isfinite(value).all() for value in results.values())


# float32: about 60 rounded terms a sum; bfloat16 inputs are exact in float32, only outputs and gradients are rounded to 2**-9
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.bfloat16, 4e-3)])
def test_low_precision_accumulates_in_float32(dtype: torch.dtype, tolerance: float) -> None:
    assert_same(random_inputs(T, dtype=dtype), tolerance, window=7, rope=ROPE)
    inputs = random_inputs(T, dtype=dtype)
    exact = nha_attention(*(x.double() for x in inputs.tensors), window=7, rope=ROPE, backend="reference")
    assert relative_error(nha_attention(*inputs.tensors, window=7, rope=ROPE, backend="torch"), exact) <= tolerance


@pytest.mark.parametrize("empty_slots", ["attend", "mask", "weight"])
def test_finite_differences(empty_slots: str) -> None:
    inputs = random_inputs(19, heads=2, kv_heads=1, slots=3)

    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        cu_seqlens = boundaries(0, 2, 19)
        return nha_attention(q, k, v, g, window=3, rope=ROPE, empty_slots=empty_slots, cu_seqlens=cu_seqlens, backend="torch")

    # truncation error of central differences with step 1e-6 is about 1e-12 relative, rounding about 1e-10;
    # fast mode compares one random projection of the Jacobian
    assert torch.autograd.gradcheck(function, inputs.tensors, eps=1e-6, atol=1e-7, rtol=1e-5, fast_mode=True)


def test_rope_depends_on_distance_only_and_factor_scales_rotated_channels() -> None:
    inputs = random_inputs(T, heads=2)
    full_rope = 10000.0 ** -(torch.arange(6, dtype=torch.float64) / 6)
    plain = nha_attention(*inputs.tensors, window=T, rope=full_rope, empty_slots="mask", backend="torch")
    scaled = nha_attention(*inputs.tensors, window=T, rope=full_rope, rope_attention_factor=1.25, empty_slots="mask", backend="torch")
    # All channels rotate and no slot is read, so the factor multiplies every logit by its square, as the scale would.
    by_scale = nha_attention(*inputs.tensors, window=T, rope=full_rope, scale=12**-0.5 * 1.25**2, empty_slots="mask", backend="torch")
    assert relative_error(scaled, by_scale) <= EXACT < relative_error(scaled, plain)


def test_angles_are_exact_at_a_million_tokens() -> None:
    from nha_kernels.rope import rope_tables, rotate

    x, y = torch.randn(2, 1, 1, 1, 12, dtype=torch.float32)
    products = []
    for start in (0, 1_000_000):
        cos, sin = rope_tables(torch.tensor([start, start + 5]), ROPE, 1.0, torch.float32)
        products.append((rotate(x, cos[:1], sin[:1]) * rotate(y, cos[1:], sin[1:])).sum())
    # table entries are rounded once at 6e-8; float32 angles would be off by 0.03 rad here
    torch.testing.assert_close(products[0], products[1], atol=5e-6, rtol=0)


def test_statistics_report_the_share_of_the_slots() -> None:
    inputs = random_inputs(T, heads=2)
    statistics = attention_statistics(*inputs.tensors, AttentionOptions(window=1, empty_slots="mask"))
    assert statistics["write_strength"].item() == pytest.approx((1 - inputs.g.exp()).mean().item())
    assert statistics["mean_decay"].item() == pytest.approx(inputs.g.exp().mean().item())
    # Values of 1 on tokens and nothing else: the output is 1 minus the slots' share where slots hold only zeros.
    inputs.v.data.fill_(1.0)
    full = nha_attention(*inputs.tensors, window=None, empty_slots="attend", backend="torch")
    share = attention_statistics(*inputs.tensors, AttentionOptions(window=None, empty_slots="attend"))["slot_share"]
    assert share.item() == pytest.approx(1 - full.mean().item())
    assert attention_statistics(*inputs.tensors, AttentionOptions(window=0))["slot_share"].item() == 1.0
