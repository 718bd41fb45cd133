"""The published way to run the operator, for bench.py: flash attention over the window, fla's `chunk_gsa` over the slots, then a merge.

It computes less than the operator does: no rotation, and the merge weighs with the window's log-sum-exp alone, because `chunk_gsa` does not
return that of the slots. Heads are not expanded. So its time is a lower bound for the composition.

fla's kernels tune themselves at their first call, over some 400 configurations, compiled one after the other. `compile_in_parallel`
compiles them in processes of their own first, into Triton's cache, and `shorten_tuning` times a configuration for 20 ms instead of 100.
What is tuned, and what is chosen from, stays fla's.
"""

import importlib.util
import multiprocessing
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.functional import logsigmoid


def published_composition(window: int, scale: float) -> Callable[..., Tensor] | None:
    """(q, k, v, g) -> [B, T, HQ, V], differentiable; None where fla-core is not installed."""
    if importlib.util.find_spec("fla") is None:
        return None
    from fla.ops.gsa import chunk_gsa

    def shifted(x: Tensor) -> Tensor:
        """A token enters the slots when it leaves the window; what never leaves is not written."""
        return torch.cat([torch.zeros_like(x[:, :window]), x[:, : x.shape[1] - window]], dim=1)

    def composition(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        tokens = q.shape[1]
        near, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, None, None, tokens, tokens, 0.0, True, False, scale=scale, window_size_left=window - 1, window_size_right=0
        )
        gates = shifted(g)
        far, _ = chunk_gsa(q, shifted(k), shifted(v), (-torch.expm1(gates)).to(q.dtype), gates, scale=scale)
        weight = torch.sigmoid(lse).transpose(1, 2)[..., None].to(q.dtype)
        return weight * near + (1 - weight) * far

    return composition


def compile_in_parallel(layouts: list[tuple[int, int]], window: int, slots: int, dim: int, processes: int) -> None:
    """Each process runs the composition at 1024 tokens with every `processes`-th configuration of each kernel."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes) as pool:
        pool.starmap(_compile_share, [(index, processes, layouts, window, slots, dim) for index in range(processes)], chunksize=1)


def shorten_tuning() -> None:
    """Call it before fla is imported."""

    def measure(call: Callable[[], Any], quantiles: tuple[float, ...]) -> Any:
        return triton.testing.do_bench(call, warmup=5, rep=20, quantiles=quantiles)

    def adjust(tuner: Any) -> None:
        tuner.do_bench = measure

    _after_construction(adjust)


def _compile_share(index: int, processes: int, layouts: list[tuple[int, int]], window: int, slots: int, dim: int) -> None:
    def adjust(tuner: Any) -> None:
        # The first is the smallest: with it in every share, none is without a configuration that fits.
        tuner.configs = list(dict.fromkeys([tuner.configs[0], *tuner.configs[index::processes]]))
        tuner.cache_results = False  # the choice from a share is no choice
        tuner.do_bench = lambda call, quantiles: triton.testing.do_bench(call, warmup=1, rep=1, quantiles=quantiles)

    _after_construction(adjust)
    composition = published_composition(window, dim**-0.5)
    assert composition is not None
    for query_heads, kv_heads in layouts:
        q, k, v = (
            torch.randn(1, 1024, h, dim, device="cuda", dtype=torch.bfloat16).requires_grad_() for h in (query_heads, kv_heads, kv_heads)
        )
        g = logsigmoid(torch.randn(1, 1024, kv_heads, slots, device="cuda")).requires_grad_()
        composition(q, k, v, g).sum().backward()
    torch.cuda.synchronize()


def _after_construction(adjust: Callable[[Any], None]) -> None:
    """`adjust` every autotuner that is made from now on."""
    from triton.runtime.autotuner import Autotuner

    construct = Autotuner.__init__

    def constructed(self: Any, *args: Any, **kwargs: Any) -> None:
        construct(self, *args, **kwargs)
        adjust(self)

    Autotuner.__init__ = constructed
