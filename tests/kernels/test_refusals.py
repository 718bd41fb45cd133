"""What the operator refuses, and that it says what was given and what is allowed."""

from typing import Any

import pytest
import torch

from nha_kernels import nha_attention
from tests.kernels.operator_cases import boundaries, random_inputs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": -1}, "window=-1"),
        ({"empty_slots": "zero"}, "allowed are attend, mask, weight"),
        ({"backend": "numpy"}, "backend='numpy'"),
        ({"rope": torch.ones(7)}, "rotary_dim <= K = 12"),
        ({"rope": torch.ones(2, 2)}, r"rotary_dim / 2"),
        ({"cu_seqlens": boundaries(0, 4)}, "must rise from 0 to T = 9"),
        ({"cu_seqlens": boundaries(0, 6, 4, 9)}, "must rise from 0 to T = 9"),
        ({"cu_seqlens": boundaries(0)}, r"integers \[N \+ 1\]"),
        ({"cu_seqlens": torch.tensor([0.0, 9.0])}, r"integers \[N \+ 1\]"),
    ],
)
def test_options(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nha_attention(*random_inputs(9).tensors, **{"window": 3, **change})


def test_shapes_and_dtypes() -> None:
    q, k, v, g = random_inputs(9).tensors
    for arguments, message in [
        ((q[0], k, v, g), "4 axes"),
        ((q, k[:, :8], v, g), "shapes must be"),
        ((q[..., :11], k, v, g), "shapes must be"),
        ((q[:, :, :3], k, v, g), "3 query heads do not divide over 2 KV heads"),
        ((q.float(), k, v, g), "share one floating dtype"),
        ((q.bfloat16(), k.bfloat16(), v.bfloat16(), g.bfloat16()), "log-gates must be torch.float32"),
    ]:
        with pytest.raises(ValueError, match=message):
            nha_attention(*arguments, window=3)
    batch = random_inputs(9, batch=2)
    with pytest.raises(ValueError, match="cu_seqlens needs B = 1"):
        nha_attention(*batch.tensors, window=3, cu_seqlens=boundaries(0, 9))
