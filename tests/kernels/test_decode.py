"""Decoding in place equals one call over the whole sequence."""

import dataclasses

import pytest
import torch

from nha_kernels import Memory, decode_memory, nha_attention, nha_decode_step
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
    names = [field.name for field in dataclasses.fields(Memory) if field.name != "window"]
    memory = Memory(**{name: torch.cat([getattr(m, name) for m in memories]) for name in names}, window=window)
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
