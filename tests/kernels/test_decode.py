"""Decoding in place equals one call over the whole sequence."""

import dataclasses

import pytest
import torch

from nha_kernels import DecodeMemory, decode_memory, explain_decode_dispatch, nha_attention, nha_decode_step
from tests.kernels.operator_cases import ROPE, random_inputs


@pytest.mark.parametrize("empty_slots", ["attend", "mask", "weight"])
@pytest.mark.parametrize("window", [0, 3])
def test_steps_equal_one_call(window: int, empty_slots: str) -> None:
    """Rows with different prefixes decode together, one to three tokens at a time."""
    inputs = random_inputs(14, batch=2)
    options = {"rope": ROPE, "empty_slots": empty_slots}
    prefixes = (2, 6)
    memories, rest, expected = [], [], []
    for row, prefix in enumerate(prefixes):
        tensors = [x[row : row + 1] for x in inputs.tensors]
        expected.append(nha_attention(*tensors, window=window, **options)[:, prefix : prefix + 6])
        _, memory = nha_attention(*(x[:, :prefix] for x in tensors), window=window, **options, return_memory=True)
        memories.append(decode_memory(memory))
        rest.append([x[:, prefix : prefix + 6] for x in tensors])
    names = [field.name for field in dataclasses.fields(DecodeMemory) if field.name != "window"]
    memory = DecodeMemory(**{name: torch.cat([getattr(m, name) for m in memories]) for name in names}, window=window)
    new = [torch.cat(parts) for parts in zip(*rest, strict=True)]
    addresses = [getattr(memory, name).data_ptr() for name in names]
    outputs, at = [], 0
    for count in (1, 2, 3):
        outputs.append(nha_decode_step(*(x[:, at : at + count] for x in new), memory, **options))
        at += count
    torch.testing.assert_close(torch.cat(outputs, 1), torch.cat(expected), rtol=1e-11, atol=1e-11)  # float64
    assert memory.length.tolist() == [prefix + 6 for prefix in prefixes]
    assert addresses == [getattr(memory, name).data_ptr() for name in names]


def test_refusals() -> None:
    q, k, v, g = random_inputs(9).tensors
    _, memory = nha_attention(q[:, :2], k[:, :2], v[:, :2], g[:, :2], window=3, return_memory=True)
    with pytest.raises(ValueError, match="1 to 8 tokens, given 9"):
        nha_decode_step(q, k, v, g, decode_memory(memory))
    with pytest.raises(ValueError, match="holds 2 rows of a window of 3"):
        nha_decode_step(q[:, 2:3], k[:, 2:3], v[:, 2:3], g[:, 2:3], memory)
    with pytest.raises(ValueError, match="window=None"):
        decode_memory(dataclasses.replace(memory, window=None))


def turned(memory: DecodeMemory, places: torch.Tensor) -> DecodeMemory:
    """The same content, with the ring of each row begun at another place."""
    rows = memory.window_keys.shape[1]
    source = ((torch.arange(rows) - places[:, None]) % rows)[:, :, None, None]
    windows = {
        name: torch.take_along_dim(getattr(memory, name), source, 1) for name in ("window_keys", "window_values", "window_log_gates")
    }
    return dataclasses.replace(memory, **windows, window_start=places).map(torch.clone)


def test_a_turned_ring_is_the_same_memory() -> None:
    """For decoding and as the memory of an ordinary call; rows of a batch may have turned differently."""
    q, k, v, g = random_inputs(12, batch=2).tensors
    _, memory = nha_attention(q[:, :9], k[:, :9], v[:, :9], g[:, :9], window=4, rope=ROPE, return_memory=True)
    straight = decode_memory(memory)
    ring = turned(straight, torch.tensor([1, 3]))
    assert not torch.equal(ring.window_keys, straight.window_keys) and torch.equal(ring.aligned().window_keys, straight.window_keys)
    assert torch.equal(decode_memory(ring).window_values, straight.window_values)
    new = [x[:, 9:] for x in (q, k, v, g)]
    expected = nha_attention(*new, window=4, rope=ROPE, memory=memory)
    assert torch.equal(nha_attention(*new, window=4, rope=ROPE, memory=ring), expected)
    assert torch.equal(ring.select_rows(torch.tensor([1])).aligned().window_keys, straight.window_keys[1:])
    assert torch.equal(nha_decode_step(*new, ring, rope=ROPE), nha_decode_step(*new, straight, rope=ROPE))
    assert torch.equal(ring.aligned().window_keys, straight.aligned().window_keys)


def test_a_memory_with_all_its_rows_decodes_too() -> None:
    q, k, v, g = random_inputs(9).tensors
    _, memory = nha_attention(q[:, :8], k[:, :8], v[:, :8], g[:, :8], window=3, return_memory=True)
    memory = memory.detach().map(torch.clone)
    ring, new = decode_memory(memory), [x[:, 8:] for x in (q, k, v, g)]
    assert torch.equal(nha_decode_step(*new, memory), nha_decode_step(*new, ring))
    assert torch.equal(memory.window_keys, ring.window_keys) and memory.length.tolist() == [9]


def test_explanation() -> None:
    q, k, v, g = random_inputs(4).tensors
    _, memory = nha_attention(q, k, v, g, window=3, return_memory=True)
    assert "window is no ring" in explain_decode_dispatch(q, k, v, g, memory)
    assert "the kernels run on CUDA devices" in explain_decode_dispatch(q, k, v, g, decode_memory(memory))
    with pytest.raises(ValueError, match="backend='triton' does not serve this decode step"):
        nha_decode_step(q, k, v, g, decode_memory(memory), backend="triton")
