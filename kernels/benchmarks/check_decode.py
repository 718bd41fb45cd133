"""Cases of check.py for the fused decode step: several steps in a row against float64, the memory afterwards, and a captured CUDA graph."""

import dataclasses
from typing import Any

import torch
from compare import TOLERANCES, make_gates, relative_error
from torch import Tensor

from nha_kernels import DecodeMemory, Memory, decode_memory, explain_decode_dispatch, nha_attention, nha_decode_step

MEMORY_TOLERANCE = 1e-5  # the slots are kept in float32 whatever the inputs are


@dataclasses.dataclass(frozen=True)
class DecodeCase:
    dtype: str = "bfloat16"
    seen: tuple[int, ...] = (0, 40, 200)  # tokens of each row before the first step
    steps: tuple[int, ...] = (1, 1, 3, 8, 1)
    kv_heads: int = 2
    group: int = 4
    key_dim: int = 128
    value_dim: int = 128
    slots: int = 64
    window: int = 64
    rotary_dim: int = -1  # -1: all channels, 0: no rotation
    empty_slots: str = "attend"
    gates: str = "usual"
    graph: bool = False

    @property
    def name(self) -> str:
        changed = (f"{f.name}={getattr(self, f.name)}" for f in dataclasses.fields(self) if getattr(self, f.name) != f.default)
        return " ".join(["decode", *changed])


def decode_cases() -> list[DecodeCase]:
    return [
        DecodeCase(),
        DecodeCase(graph=True, steps=(1,) * 6),
        DecodeCase(graph=True, steps=(4,) * 3, empty_slots="weight"),
        DecodeCase(empty_slots="mask", gates="mixed"),
        DecodeCase(empty_slots="weight", gates="slow", rotary_dim=64),
        DecodeCase(group=8, steps=(8, 1)),
        DecodeCase(group=7, slots=48, window=5),
        DecodeCase(group=1, slots=16, window=3, gates="extreme"),
        DecodeCase(group=2, window=0, rotary_dim=0),
        DecodeCase(slots=256, window=1000, seen=(1500, 300)),
        DecodeCase(window=5000, seen=(6000,), kv_heads=1),
        DecodeCase(key_dim=64, value_dim=64, slots=32),
        DecodeCase(key_dim=64, value_dim=256),
        DecodeCase(key_dim=256, value_dim=256, group=8, slots=128),
        DecodeCase(dtype="float16", empty_slots="weight"),
        DecodeCase(dtype="float32", empty_slots="weight", gates="mixed"),
        DecodeCase(dtype="float32", group=8, steps=(8, 1), window=70),
        DecodeCase(dtype="float32", key_dim=256, value_dim=256, steps=(1, 5)),
    ]


def check_decode(case: DecodeCase, seed: int) -> dict[str, Any]:
    generator = torch.Generator("cuda").manual_seed(seed)
    dtype = getattr(torch, case.dtype)
    options = _options(case)
    start = _memory_of_rows(case, options, generator)
    steps = [_tokens(case, len(case.seen), count, generator) for count in case.steps]
    reason = explain_decode_dispatch(*steps[0], start)
    if not reason.startswith("triton"):
        return {"passed": True, "refused": reason}

    run = _replayed if case.graph else _run
    first, second = run(steps, start, options), run(steps, start, options)
    deterministic = all(torch.equal(first[name], second[name]) for name in first)
    exact = _exact(case, steps, start, options)
    errors = {name: relative_error(first[name], exact[name]) for name in exact}
    passed = all(error <= (TOLERANCES[dtype][0] if name.startswith("out") else MEMORY_TOLERANCE) for name, error in errors.items())
    return {"passed": passed and deterministic, "deterministic": deterministic, "errors": errors}


def _options(case: DecodeCase) -> dict[str, Any]:
    rotary_dim = case.key_dim if case.rotary_dim < 0 else case.rotary_dim
    rope = 10000.0 ** (-torch.arange(0, rotary_dim, 2, device="cuda").double() / rotary_dim) if rotary_dim else None
    return {"rope": rope, "rope_attention_factor": 1.2, "empty_slots": case.empty_slots}


def _tokens(case: DecodeCase, batch: int, count: int, generator: torch.Generator) -> list[Tensor]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, count, *shape, generator=generator, device="cuda").to(getattr(torch, case.dtype))

    q = normal(case.kv_heads * case.group, case.key_dim)
    k, v = normal(case.kv_heads, case.key_dim), normal(case.kv_heads, case.value_dim)
    return [q, k, v, make_gates(case.gates, (batch, count, case.kv_heads, case.slots), generator)]


def _memory_of_rows(case: DecodeCase, options: dict[str, Any], generator: torch.Generator) -> DecodeMemory:
    rows = []
    for seen in case.seen:
        tokens = _tokens(case, 1, seen, generator)
        row = decode_memory(nha_attention(*tokens, window=case.window, **options, return_memory=True, backend="torch")[1])
        for name in ("window_keys", "window_values", "window_log_gates"):  # places that hold nothing must never be read
            getattr(row, name)[:, : max(0, case.window - seen)] = torch.nan
        rows.append(row)
    names = [field.name for field in dataclasses.fields(DecodeMemory) if field.name != "window"]
    return DecodeMemory(**{name: torch.cat([getattr(row, name) for row in rows]) for name in names}, window=case.window)


def _collect(outputs: list[Tensor], memory: Memory) -> dict[str, Tensor]:
    fields = ("slot_keys", "slot_values", "slot_log_decay", "window_keys", "window_values", "window_log_gates")
    aligned = memory.aligned()
    tensors = {name: getattr(aligned, name) for name in fields}
    held = torch.arange(aligned.window_keys.shape[1], device="cuda") >= aligned.window_keys.shape[1] - aligned.length[:, None]
    tensors |= {name: x[held] for name, x in tensors.items() if name.startswith("window_")}
    return {**{f"out{i}": out for i, out in enumerate(outputs)}, **tensors, "length": aligned.length.double()}


def _run(steps: list[list[Tensor]], start: DecodeMemory, options: dict[str, Any]) -> dict[str, Tensor]:
    memory = start.map(torch.clone)
    return _collect([nha_decode_step(*tokens, memory, **options, backend="triton") for tokens in steps], memory)


def _replayed(steps: list[list[Tensor]], start: DecodeMemory, options: dict[str, Any]) -> dict[str, Tensor]:
    """Every step is a replay of one graph, captured from fixed buffers; all steps have the same shape."""
    memory = start.map(torch.clone)
    inputs = [x.clone() for x in steps[0]]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        nha_decode_step(*inputs, memory, **options, backend="triton")  # compiles outside of the capture
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = nha_decode_step(*inputs, memory, **options, backend="triton")
    for field in dataclasses.fields(start):
        if field.name != "window":
            getattr(memory, field.name).copy_(getattr(start, field.name))
    outputs = []
    for tokens in steps:
        for buffer, x in zip(inputs, tokens, strict=True):
            buffer.copy_(x)
        graph.replay()
        outputs.append(out.clone())
    return _collect(outputs, memory)


def _exact(case: DecodeCase, steps: list[list[Tensor]], start: DecodeMemory, options: dict[str, Any]) -> dict[str, Tensor]:
    memory: Memory = start.aligned().map(lambda x: x.double() if x.is_floating_point() else x.clone())
    outputs = []
    for tokens in steps:
        out, memory = nha_attention(
            *(x.double() for x in tokens), window=case.window, memory=memory, **options, return_memory=True, backend="torch"
        )
        outputs.append(out)
    return _collect(outputs, memory)
