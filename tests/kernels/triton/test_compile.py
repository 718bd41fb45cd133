"""Every kernel compiles for the GPUs that we name, without one: shared memory fits, registers do not spill without bound."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: the kernels are not compiled here")

from nha_kernels import AttentionOptions, Memory, decode_memory
from tests.kernels.triton.launches import Launch, recorded, stack_bytes

SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # what one program may take
STACK_BYTES = 1024  # a few dozen spilled registers; ten times as much was seen where a tile was too large, and it was slow


SMALL, USUAL = (64, 32, 32), (128, 64, 64)  # head size, slots, window; the usual ones have tiles of their own


def launches_of(
    dim: int, slots: int, window: int, *, tokens: int = 160, batch: int = 1, group: int = 4, dtype: torch.dtype = torch.bfloat16
) -> list[Launch]:
    from nha_kernels.triton.attention.backend import triton_attention

    heads = 2
    q, k, v = (torch.zeros(batch, tokens, count, dim, dtype=dtype, requires_grad=True) for count in (group * heads, heads, heads))
    g = torch.zeros(batch, tokens, heads, slots, requires_grad=True)
    with recorded() as launches:
        options = AttentionOptions(window, torch.ones(dim // 2, dtype=torch.float64))
        out, _ = triton_attention(q, k, v, g, options, cu_seqlens=None, memory=None)
        out.sum().backward()
    return launches


@pytest.mark.parametrize(
    ("capability", "sizes"),
    [(80, SMALL), (90, SMALL), (100, SMALL), (90, USUAL), pytest.param(100, USUAL, marks=pytest.mark.slow)],
)
def test_kernels_compile(capability: int, sizes: tuple[int, int, int]) -> None:
    launches = launches_of(*sizes)
    kernels = {launch.kernel.__name__: launch for launch in launches}
    assert {"scan_segments", "attention_forward", "slot_backward_reads", "compose_state_gradients"} <= set(kernels)
    assert {"slot_backward_writes", "window_backward_queries", "window_backward_keys", "fill_table"} <= set(kernels)
    assert_compile(launches, capability)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "dtype", "stack_limit"),
    [
        ((128, 64, 0), torch.bfloat16, STACK_BYTES),
        ((128, 256, 0), torch.bfloat16, 2 * STACK_BYTES),  # four blocks of slots, unrolled, twice
        ((256, 64, 64), torch.float32, 40 * STACK_BYTES),  # exact products of 256 channels: slow, and no head more at a time
    ],
)
def test_the_largest_tiles_compile(sizes: tuple[int, int, int], dtype: torch.dtype, stack_limit: int) -> None:
    assert_compile(launches_of(*sizes, dtype=dtype), 90, stack_limit)


@pytest.mark.parametrize("lengths", [(16, 272, 512, 4096), (17, 100, 300, 4095)])
def test_kernels_are_compiled_once_for_multiples_of_16_and_once_for_all_other_lengths(lengths: tuple[int, ...]) -> None:
    """Triton tells integers apart that are 1 or multiples of 16; which of them numbers of chunks and segments are must not matter."""
    seen: dict[str, set[tuple[object, ...]]] = {}
    for tokens, batch in zip(lengths, (1, 2, 1, 3), strict=True):
        for launch in launches_of(128, 64, 64, tokens=tokens, batch=batch):
            free = [p for p in launch.kernel.params if not p.is_constexpr and not p.do_not_specialize]
            values = [launch.arguments[parameter.name] for parameter in free]
            kinds = [(x == 1, x % 16 == 0) if isinstance(x, int) else type(x) for x in values]
            first_pass = launch.arguments.get("FIRST_PASS")
            seen.setdefault(f"{launch.kernel.__name__} {first_pass}", set()).add(tuple(kinds))
    assert "scan_segments True" in seen and "slot_backward_reads None" in seen
    assert all(len(kinds) == 1 for kinds in seen.values()), {name: len(kinds) for name, kinds in seen.items()}


@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_decode_kernels_compile(capability: int) -> None:
    from nha_kernels.triton.decode.step import decode_step

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(2, *shape, dtype=dtype)

    heads, slots, window, dim, bf16 = 2, 64, 64, 128, torch.bfloat16
    with recorded() as launches:
        decode_step(
            *(zeros(1, count, dim, dtype=bf16) for count in (4 * heads, heads, heads)),
            zeros(1, heads, slots),
            decode_memory(Memory.empty(2, heads, slots, dim, dim, window, dtype=bf16)),
            AttentionOptions(window, torch.ones(dim // 2, dtype=torch.float64), empty_slots="weight"),
        )
    assert [launch.kernel.__name__ for launch in launches] == ["attend_pieces", "merge_pieces"]
    assert_compile(launches, capability)


@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_kernels_beside_a_library_compile(capability: int) -> None:
    from nha_kernels.triton.attention.merge import merge_into
    from nha_kernels.triton.attention.rotary import rotated_heads

    heads = torch.zeros(2, 48, 8, 128, dtype=torch.bfloat16)
    with recorded() as launches:
        rotated_heads(heads, torch.arange(48)[None], torch.ones(64, dtype=torch.float64), 1.2)
        merge_into(heads, torch.zeros(2, 48, 8), (heads.clone(), torch.zeros(2, 48, 8)))
    assert [launch.kernel.__name__ for launch in launches] == ["rotate_heads", "merge_rows"]
    assert_compile(launches, capability)


@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_summary_kernels_compile(capability: int) -> None:
    from nha_kernels.triton.summary.backward import add_summary_gradients_on_gpu
    from nha_kernels.triton.summary.forward import summarise_on_gpu

    k, v = (torch.zeros(1, 600, 2, 128, dtype=torch.bfloat16) for _ in range(2))
    g, summary = torch.zeros(1, 600, 2, 64), torch.zeros(1, 2, 64, 257)
    with recorded() as launches:
        add_summary_gradients_on_gpu(k, v, g, summarise_on_gpu(k, v, g, summary), summary, k, v, g)
    assert len(launches) == 6
    assert_compile(launches, capability)


def assert_compile(launches: list[Launch], capability: int, stack_limit: int = STACK_BYTES) -> None:
    for name, launch in {launch.kernel.__name__: launch for launch in launches}.items():
        compiled = launch.compile(capability)
        assert compiled.metadata.shared <= SHARED_BYTES[capability], name
        assert stack_bytes(compiled) <= stack_limit, name
