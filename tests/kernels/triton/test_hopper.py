"""The forward for Hopper GPUs: which calls it serves, and that its kernels compile without a GPU."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: the kernels are not compiled here")

from nha_kernels import AttentionOptions, explain_dispatch
from nha_kernels.triton import dispatch
from nha_kernels.triton.hopper import conditions
from tests.kernels.triton.launches import Launch, recorded, stack_bytes

SHARED_BYTES = 227 * 1024  # what one program may take


def call(
    *, group: int = 4, dim: int = 128, slots: int = 64, dtype: torch.dtype = torch.bfloat16, tokens: int = 160
) -> tuple[torch.Tensor, ...]:
    q, k = torch.zeros(1, tokens, 2 * group, dim, dtype=dtype), torch.zeros(1, tokens, 2, dim, dtype=dtype)
    return q, k, torch.zeros_like(k), torch.zeros(1, tokens, 2, slots)


def options(*, window: int = 64, pairs: int = 64, empty_slots: str = "attend") -> AttentionOptions:
    return AttentionOptions(window=window, rope=torch.ones(pairs, dtype=torch.float64), empty_slots=empty_slots)


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conditions, "capability_of", lambda device: (9, 0))
    monkeypatch.setattr(conditions, "triton_version", lambda: conditions.CHECKED_TRITON[0])


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(
    ("shape", "how", "continues", "reason"),
    [
        ({}, {}, False, None),
        ({"group": 8}, {"empty_slots": "mask"}, False, None),
        ({}, {}, True, "it takes neither a memory nor documents"),
        ({"group": 2}, {}, False, "it takes a multiple of 4 query heads to a KV head, given 2"),
        ({"slots": 32}, {}, False, "it takes bfloat16, K = V = 128, M = 64 and W = 64"),
        ({"dim": 64}, {}, False, "it takes bfloat16, K = V = 128, M = 64 and W = 64"),
        ({"dtype": torch.float16}, {}, False, "it takes bfloat16, K = V = 128, M = 64 and W = 64"),
        ({}, {"window": 32}, False, "it takes bfloat16, K = V = 128, M = 64 and W = 64"),
        ({}, {"empty_slots": "weight"}, False, "it takes the conventions attend and mask"),
        ({}, {"pairs": 32}, False, "it rotates all channels"),
    ],
)
def test_it_serves_what_was_checked(shape: dict, how: dict, continues: bool, reason: str | None) -> None:
    assert conditions.refusal(*call(**shape), options(**how), continues=continues) == reason


@pytest.mark.usefixtures("on_hopper")
def test_it_needs_the_checked_triton_and_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conditions, "triton_version", lambda: "3.7.1")
    assert conditions.refusal(*call(), options(), continues=False) == "it was checked with triton 3.6.0 only, this is 3.7.1"
    monkeypatch.setattr(conditions, "capability_of", lambda device: (10, 0))
    assert conditions.refusal(*call(), options(), continues=False) == "it was checked on compute capability 9.0 only"


@pytest.mark.usefixtures("on_hopper")
def test_explain_dispatch_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "refusal_of_device", lambda *_, **__: None)
    named = "forward by the Hopper kernels"
    assert named in explain_dispatch(*call(), window=64) and named in explain_dispatch(*call(group=16), window=64)
    assert named not in explain_dispatch(*call(), window=64, cu_seqlens=torch.tensor([0, 20, 160]))
    assert named not in explain_dispatch(*call(), window=63) and named not in explain_dispatch(*call(group=12), window=64)


def launches(*, tokens: int, group: int, starts: bool, monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    from nha_kernels.triton.hopper import forward

    monkeypatch.setattr(forward, "_multiprocessors", lambda device: 132)
    q, k, v, g = call(tokens=tokens, group=group)
    angles = (torch.zeros(64, 64, dtype=torch.float16), torch.zeros(64, 64, dtype=torch.float16))
    kept = forward.empty_starts(k, v, g, 2) if starts else None
    with recorded() as found:
        forward.hopper_forward(q, k, v, g, torch.ones(64, dtype=torch.float64), angles, 0.1, "attend", kept)
    return found


def test_its_kernels_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    found = launches(tokens=160, group=4, starts=True, monkeypatch=monkeypatch)
    assert [launch.kernel.__name__ for launch in found] == ["form_factors", "prepare_chunks", "carry_slots", "attend_chunks"]
    for launch in found:
        compiled = launch.compile(90)
        assert compiled.metadata.shared <= SHARED_BYTES and stack_bytes(compiled) <= 512, launch.kernel.__name__


def test_long_sequences_go_in_slabs_of_whole_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    found = launches(tokens=40000, group=8, starts=True, monkeypatch=monkeypatch)
    attend = [launch.arguments for launch in found if launch.kernel.__name__ == "attend_chunks"]
    assert [(a["first_chunk"], a["num_chunks"]) for a in attend] == [(0, 512), (512, 113)]
    assert attend[0]["PARTS"] == 2
    carry = [launch.arguments for launch in found if launch.kernel.__name__ == "carry_slots"]
    assert [(a["first_segment"], a["FIRST"]) for a in carry] == [(0, True), (256, False)]
