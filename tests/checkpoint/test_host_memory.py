"""Copies for the writers: as `tensor.to("cpu", copy=True)` makes them, in memory that goes from one checkpoint to the next."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nha_megatron.checkpoint.host_memory import HostMemory

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def state(device: str, value: float) -> list[Tensor]:
    """Two of one kind, one of another type, a transposed one, a slice with gaps, and one without elements."""
    whole = torch.full((4, 6), value, device=device)
    return [whole, whole + 1, whole.bfloat16(), whole.t() + 2, whole[:, ::2], whole[:0]]


@pytest.mark.parametrize("device", DEVICES)
def test_a_copy_is_what_torch_makes(device: str) -> None:
    memory = HostMemory()
    memory.begin()
    for tensor in state(device, 3.0):
        ours, theirs = memory.copy(tensor), tensor.to("cpu", copy=True)
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype and ours.device.type == "cpu"
        assert ours.stride() == theirs.stride() and ours.untyped_storage().nbytes() == theirs.untyped_storage().nbytes()
        tensor.fill_(0.0)
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("device", DEVICES)
def test_the_memory_of_one_checkpoint_takes_the_next(device: str) -> None:
    memory = HostMemory()
    memory.begin()
    first = [memory.copy(tensor) for tensor in state(device, 1.0)]
    places = [tensor.data_ptr() for tensor in first]
    assert len(set(places[:5])) == 5  # no two of one checkpoint share memory
    memory.begin()
    second = [memory.copy(tensor) for tensor in state(device, 5.0)]
    assert {tensor.data_ptr() for tensor in second} == set(places)
    assert all(torch.equal(ours, theirs.cpu()) for ours, theirs in zip(second, state(device, 5.0), strict=True))


def test_tensors_that_are_no_longer_there_keep_no_memory() -> None:
    memory = HostMemory()
    for shape in ((3,), (4,), (4,)):
        memory.begin()
        memory.copy(torch.ones(shape))
    assert [tensor.shape for tensor in memory._used] == [(4,)] and not any(memory._free.values())


def test_a_parameter_is_copied_without_its_graph() -> None:
    memory = HostMemory()
    memory.begin()
    assert not memory.copy(torch.nn.Parameter(torch.ones(2))).requires_grad
