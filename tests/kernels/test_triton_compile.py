"""Every kernel compiles for the GPUs that we name, without one: shared memory fits, registers do not spill without bound."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: the kernels are not compiled here")

from tests.kernels.triton_launches import recorded, stack_bytes

SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # what one program may take
STACK_BYTES = 1024  # a few dozen spilled registers; ten times as much was seen where a tile was too large, and it was slow


@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_kernels_compile(capability: int) -> None:
    from nha_kernels.triton.attention import triton_attention

    tokens, heads, dim = 160, 2, 64
    q, k, v = (torch.zeros(1, tokens, count, dim, dtype=torch.bfloat16, requires_grad=True) for count in (4 * heads, heads, heads))
    g = torch.zeros(1, tokens, heads, 32, requires_grad=True)
    with recorded() as launches:
        out, _ = triton_attention(
            q,
            k,
            v,
            g,
            window=32,
            rope=torch.ones(dim // 2, dtype=torch.float64),
            rope_attention_factor=1.0,
            scale=dim**-0.5,
            empty_slots="attend",
            cu_seqlens=None,
            memory=None,
        )
        out.sum().backward()
    kernels = {launch.kernel.__name__: launch for launch in launches}
    assert {"scan_segments", "attention_forward", "slot_backward_reads", "compose_state_gradients"} <= set(kernels)
    assert {"slot_backward_writes", "window_backward_queries", "window_backward_keys", "fill_table"} <= set(kernels)
    for name, launch in kernels.items():
        compiled = launch.compile(capability)
        assert compiled.metadata.shared <= SHARED_BYTES[capability], name
        assert stack_bytes(compiled) <= STACK_BYTES, name
