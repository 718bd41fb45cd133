"""Cost as counted operations and largest arrays, never as seconds."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from nha_kernels import nha_attention
from tests.kernels.operator_cases import random_inputs


class LargestTensor(TorchDispatchMode):
    """Records the largest number of elements that any operation produced."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return result


def operations(tokens: int, window: int) -> int:
    counter = FlopCounterMode(display=False)
    with counter:
        nha_attention(*random_inputs(tokens, dtype=torch.float32).tensors, window=window, backend="torch").sum().backward()
    return counter.get_total_flops()


def test_operations_grow_linearly_with_the_sequence() -> None:
    assert operations(4096, 64) / operations(1024, 64) == pytest.approx(4, rel=0.02)


def test_operations_grow_with_the_window_not_with_its_square() -> None:
    slots_only = operations(2048, 0)
    narrow, wide = (operations(2048, window) - slots_only for window in (64, 256))
    # a band of W + block columns for every query
    assert wide / narrow < 3.5


@pytest.mark.parametrize("window", [64, 4096, None])
def test_no_array_grows_with_tokens_times_window(window: int | None) -> None:
    tokens = 4096
    inputs = random_inputs(tokens, dtype=torch.float32, slots=16)
    with LargestTensor() as largest:
        nha_attention(*inputs.tensors, window=window, backend="torch").sum().backward()
    # one group of chunk pairs, or one block of logits; the four heads' T * T would be 2**26
    assert largest.elements <= 2**23
