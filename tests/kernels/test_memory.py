"""Continuing from a memory: any split of a sequence gives what one call gives, and its gradients."""

import pytest
import torch

from nha_kernels import Memory, nha_attention, slot_summary
from tests.kernels.operator_cases import ROPE, assert_memories_equal, boundaries, float_tensors, random_inputs, relative_error

EXACT = 1e-11  # float64 on both sides
T = 37
BACKENDS = ["torch", "reference"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [0, 1, 7, T, None])
def test_every_split_point_equals_one_call(backend: str, window: int | None) -> None:
    inputs = random_inputs(T, batch=2, heads=2, kv_heads=1)
    options = {"window": window, "rope": ROPE, "empty_slots": "weight", "return_memory": True}
    whole, whole_memory = nha_attention(*inputs.tensors, backend="torch", **options)
    for split in range(0, T + 1, 1 if backend == "torch" else 9):
        first, memory = nha_attention(*inputs.part(slice(0, split)), backend=backend, **options)
        second, memory = nha_attention(*inputs.part(slice(split, T)), memory=memory, backend=backend, **options)
        assert relative_error(torch.cat([first, second], 1), whole) <= EXACT
        assert_memories_equal(memory, whole_memory, EXACT)


@pytest.mark.parametrize("window", [0, 4, 50])
def test_gradients_flow_through_the_memory(window: int) -> None:
    inputs = random_inputs(T, batch=2)
    options = {"window": window, "rope": ROPE, "return_memory": True, "backend": "torch"}
    weights = torch.randn(2, T, 4, 8, dtype=torch.float64)
    whole = torch.autograd.grad((nha_attention(*inputs.tensors, **options)[0] * weights).sum(), inputs.tensors)
    memory, outputs = None, []
    for start in range(0, T, 10):
        out, memory = nha_attention(*inputs.part(slice(start, start + 10)), memory=memory, **options)
        outputs.append(out)
    pieces = torch.autograd.grad((torch.cat(outputs, 1) * weights).sum(), inputs.tensors)
    for name, a, b in zip("qkvg", pieces, whole, strict=True):
        assert relative_error(a, b) <= EXACT, f"d{name}"


def test_gradient_with_respect_to_an_arbitrary_memory_equals_the_reference() -> None:
    inputs = random_inputs(T)
    memory = Memory(
        slot_keys=torch.randn(1, 2, 5, 12, dtype=torch.float64),
        slot_values=torch.randn(1, 2, 5, 8, dtype=torch.float64),
        slot_log_decay=-torch.rand(1, 2, 5, dtype=torch.float64),
        window_keys=torch.randn(1, 6, 2, 12, dtype=torch.float64),
        window_values=torch.randn(1, 6, 2, 8, dtype=torch.float64),
        window_log_gates=-torch.rand(1, 6, 2, 5, dtype=torch.float64),
        length=torch.tensor([1000]),
        window=6,
    )
    leaves = [tensor.requires_grad_() for tensor in float_tensors(memory).values()]
    gradients = {}
    for backend in BACKENDS:
        out = nha_attention(*inputs.tensors, window=6, memory=memory, rope=ROPE, empty_slots="weight", backend=backend)
        gradients[backend] = torch.autograd.grad(out.square().sum(), leaves)
    for a, b in zip(*gradients.values(), strict=True):
        assert relative_error(a, b) <= EXACT


@pytest.mark.parametrize("window", [0, 7, None])
def test_rows_of_different_length(window: int | None) -> None:
    """Each row of a batch continues from its own length."""
    inputs = random_inputs(20, batch=3)
    options = {"window": window, "rope": ROPE, "return_memory": True}
    lengths = [3, 20, 0]
    memories = [
        nha_attention(*(x[row : row + 1, :n] for x in inputs.tensors), backend="reference", **options)[1] for row, n in enumerate(lengths)
    ]
    rows = max(memory.window_keys.shape[1] for memory in memories)

    def stacked(name: str) -> torch.Tensor:
        tensors = [getattr(memory, name) for memory in memories]
        if name.startswith("window"):
            # rows that hold nothing are poisoned: they must never be read
            tensors = [torch.cat([x.new_full((1, rows - x.shape[1], *x.shape[2:]), torch.nan), x], 1) for x in tensors]
        return torch.cat(tensors)

    names = [*float_tensors(memories[0]), "length"]
    memory = Memory(**{name: stacked(name) for name in names}, window=window)
    more = random_inputs(11, batch=3, seed=5)
    for backend in BACKENDS:
        out, after = nha_attention(*more.tensors, memory=memory, backend=backend, **options)
        assert after.length.tolist() == [14, 31, 11]
        for row, single in enumerate(memories):
            tokens = [x[row : row + 1] for x in more.tensors]
            alone, alone_after = nha_attention(*tokens, memory=single, backend="reference", **options)
            assert relative_error(out[row : row + 1], alone) <= EXACT
            assert relative_error(after.slot_keys[row : row + 1], alone_after.slot_keys) <= EXACT


def test_a_memory_continues_the_first_document_and_the_last_one_is_returned() -> None:
    inputs, before = random_inputs(T), random_inputs(15, seed=9)
    options = {"window": 4, "rope": ROPE, "return_memory": True}
    _, memory = nha_attention(*before.tensors, backend="torch", **options)
    for cu_seqlens in (boundaries(0, 9, T), boundaries(0, 0, 9, T), boundaries(0, 9, T, T), boundaries(0, T)):
        results = [nha_attention(*inputs.tensors, memory=memory, cu_seqlens=cu_seqlens, backend=backend, **options) for backend in BACKENDS]
        assert relative_error(results[0][0], results[1][0]) <= EXACT
        assert_memories_equal(results[0][1], results[1][1], EXACT)
    assert nha_attention(*inputs.tensors, memory=memory, cu_seqlens=boundaries(0, 9, T, T), **options)[1].length.tolist() == [0]


def test_memory_is_constant_in_size() -> None:
    sizes = []
    for tokens in (50, 200):
        _, memory = nha_attention(*random_inputs(tokens).tensors, window=7, return_memory=True)
        sizes.append(memory.num_bytes)
    assert sizes[0] == sizes[1]


def test_summaries_compose_to_the_slots() -> None:
    """slots_out = exp(log_decay) * slots_in + update, over any cut: what context parallelism sends."""
    inputs = random_inputs(T)
    _, memory = nha_attention(*inputs.tensors, window=0, return_memory=True)
    keys = values = log_decay = 0.0
    for part in (slice(0, 5), slice(5, 5), slice(5, 30), slice(30, T)):
        decay, update_keys, update_values = slot_summary(*inputs.part(part)[1:])
        keys = decay.exp()[..., None] * keys + update_keys
        values = decay.exp()[..., None] * values + update_values
        log_decay = log_decay + decay
    assert relative_error(keys, memory.slot_keys) <= EXACT
    assert relative_error(values, memory.slot_values) <= EXACT
    assert relative_error(log_decay, memory.slot_log_decay) <= EXACT


def test_another_window_or_shape_is_refused() -> None:
    inputs = random_inputs(5)
    _, memory = nha_attention(*inputs.tensors, window=3, return_memory=True)
    with pytest.raises(ValueError, match="made with window=3, this call has window=4"):
        nha_attention(*inputs.tensors, window=4, memory=memory)
    with pytest.raises(ValueError, match=r"the memory has \(B, H, M, K, V\)"):
        nha_attention(*random_inputs(5, slots=6).tensors, window=3, memory=memory)


def test_empty_memory_and_row_selection() -> None:
    inputs = random_inputs(9, batch=2)
    empty = Memory.empty(2, 2, 5, 12, 8, 3, dtype=torch.float64)
    out, memory = nha_attention(*inputs.tensors, window=3, memory=empty, return_memory=True)
    assert relative_error(out, nha_attention(*inputs.tensors, window=3)) <= EXACT
    swapped = memory.select_rows(torch.tensor([1, 0, 1]))
    assert torch.equal(swapped.slot_keys, memory.slot_keys[[1, 0, 1]]) and swapped.length.tolist() == [9, 9, 9]
