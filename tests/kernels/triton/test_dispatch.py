"""What the kernels refuse, with the reason; `auto` then takes the torch backend."""

import pytest
import torch

from nha_kernels import AttentionOptions, Memory, explain_dispatch, nha_attention
from nha_kernels.triton.dispatch import choose_tiles

pytest.importorskip("triton", reason="triton is not installed: nothing is dispatched to it")

from nha_kernels.triton.attention import fused


def call(
    *, group: int = 4, dims: tuple[int, int] = (128, 128), slots: int = 64, dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, ...]:
    q, k = torch.zeros(1, 4, 2 * group, dims[0], dtype=dtype), torch.zeros(1, 4, 2, dims[0], dtype=dtype)
    return q, k, torch.zeros(1, 4, 2, dims[1], dtype=dtype), torch.zeros(1, 4, 2, slots)


def test_cpu_tensors_go_to_torch() -> None:
    assert explain_dispatch(*call(), window=64).startswith("torch: the kernels run on CUDA devices")
    with pytest.raises(ValueError, match="backend='triton' does not serve this call: the kernels run on CUDA devices"):
        nha_attention(*call(), window=64, backend="triton")


@pytest.mark.parametrize(
    ("shape", "window", "reason"),
    [
        ({"dims": (96, 128)}, 64, "K and V must be 64, 128 or 256"),
        ({"slots": 24}, 64, "multiple of 16 from 16 to 256, given 24"),
        ({"slots": 272}, 64, "multiple of 16 from 16 to 256, given 272"),
        ({"dtype": torch.float64}, 64, "the kernels take bfloat16, float16 and float32, not torch.float64"),
        ({"dtype": torch.float32}, None, "takes bfloat16 and float16, not torch.float32"),
        ({"dims": (64, 128)}, None, "needs K = V"),
        ({"dims": (100, 100)}, None, "a multiple of 8 up to 256"),
    ],
)
def test_refusals(shape: dict, window: int | None, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # lets CPU tensors pass the test of the device
    explanation = explain_dispatch(*call(**shape), window=window)
    assert explanation.startswith("torch: ") and reason in explanation


def test_tables_are_static(monkeypatch: pytest.MonkeyPatch) -> None:
    """Length and batch do not change the choice: ranks with different shapes of data run the same kernels."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    short = explain_dispatch(*call(), window=64)
    long = explain_dispatch(*(x.expand(3, -1, -1, -1).repeat(1, 50, 1, 1) for x in call()), window=64)
    assert short == long and short.startswith("triton: fused, Tiles(chunk=16")


def test_wide_windows_attend_through_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert explain_dispatch(*call(), window=1023).startswith("triton: fused")
    assert explain_dispatch(*call(), window=1024).startswith(
        "triton: window by torch-flash (none was measured on this device; not flash-attn-4: "
    )
    assert "slots fused" in explain_dispatch(*call(), window=1024)
    assert explain_dispatch(*call(), window=None).endswith("slots are never written")


@pytest.mark.parametrize("shape", [{"dtype": torch.float32}, {"dims": (128, 64)}])
def test_wide_windows_that_no_library_takes_are_fused(shape: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert explain_dispatch(*call(**shape), window=4096).startswith("triton: fused")


def test_full_windows_without_a_memory_need_no_slot_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that the slot kernels refuse are served; a memory may hold slots, so with one they are not."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    odd = call(dims=(96, 96), slots=24)
    assert explain_dispatch(*odd, window=None).startswith("triton: window by torch-flash")
    memory = Memory.empty(1, 2, 24, 96, 96, None, dtype=torch.bfloat16)
    assert explain_dispatch(*odd, window=None, memory=memory).startswith("torch: the slots of the memory are read by kernels that do not")
    memory = Memory.empty(1, 2, 64, 128, 128, None, dtype=torch.bfloat16)
    assert "slots fused" in explain_dispatch(*call(), window=None, memory=memory)


def test_large_groups_run_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "fused, 2 parts of the 12 query heads to a KV head" in explain_dispatch(*call(group=12), window=64)
    assert "fused, 2 parts of the 5 query heads" in explain_dispatch(*call(group=5, dtype=torch.float32), window=64)
    assert "fused, 5 parts of the 5 query heads" in explain_dispatch(*call(group=5, dtype=torch.float32, dims=(256, 64)), window=64)


def test_a_part_of_a_group_has_the_tiles_of_its_own_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """9 query heads run as 5 and 4. The tiles of 5 heads (128 rows, 8 warps) read out of bounds with the 64 rows of 4."""
    q, k, v, g = call(group=9)
    taken = []

    def apply(part: torch.Tensor, *more: object) -> tuple[torch.Tensor, torch.Tensor]:
        taken.append((part.shape[2] // k.shape[2], more[-1]))
        return part, part

    monkeypatch.setattr(fused._FusedAttention, "apply", apply)
    out, _ = fused.fused_attention(q, k, v, g, None, None, 0, AttentionOptions(window=64))
    assert out.shape == q.shape
    assert taken == [(heads, choose_tiles(*call(group=heads), 64)) for heads in (5, 4)]
    assert [tiles.forward_warps for _, tiles in taken] == [8, 4]
