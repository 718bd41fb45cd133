"""Compares the triton backend on this GPU with the torch backend in float64, forward and every gradient.

    PYTHONPATH=kernels python kernels/benchmarks/check.py [--output results.json] [--workers 12] [--only SUBSTRING] [--skip SUBSTRING]

Cases cover every choice of tiles; what dispatch refuses is listed with the reason and not run. Outputs start as NaN, and every case runs
twice and must give the same bits, except those of kernels that are not deterministic. Exit status 1 when a case is outside of its
tolerance. Compiling dominates the time, so cases are spread over processes.
"""

import argparse
import dataclasses
import json
import multiprocessing
import sys
import time
import traceback
import zlib
from typing import Any

import torch
from check_decode import DecodeCase, check_decode, decode_cases
from check_summary import SummaryCase, check_summary, summary_cases
from compare import TOLERANCES, make_gates, relative_error
from torch import Tensor

from nha_kernels import Memory, nha_attention
from nha_kernels.triton.dispatch import WIDEST_FUSED_WINDOW, refusal


@dataclasses.dataclass(frozen=True)
class Case:
    dtype: str = "bfloat16"
    batch: int = 1
    tokens: int = 200
    kv_heads: int = 2
    group: int = 4
    key_dim: int = 128
    value_dim: int = 128
    slots: int = 64
    window: int | None = 64
    rotary_dim: int = -1  # -1: all channels, 0: no rotation
    empty_slots: str = "attend"
    documents: tuple[int, ...] = ()
    memory: tuple[int, ...] = ()  # tokens that each row has seen before
    gates: str = "usual"  # usual | slow | extreme | mixed
    deterministic: bool = True  # False: full attention may go through cuDNN, whose backward differs from run to run

    @property
    def name(self) -> str:
        changed = (f"{f.name}={getattr(self, f.name)}" for f in dataclasses.fields(self) if getattr(self, f.name) != f.default)
        return " ".join(changed) or "default"


def cases() -> list[Case]:
    documents = (0, 37, 37, 38, 111, 200)
    found = [
        Case(),
        Case(gates="extreme"),
        Case(gates="mixed", tokens=333),
        Case(gates="slow", empty_slots="weight"),
        Case(documents=documents, empty_slots="mask", window=16),
        Case(documents=documents, empty_slots="weight", memory=(70,)),
        Case(batch=2, memory=(5, 90), empty_slots="weight", window=48, tokens=77),
        Case(batch=2, tokens=150, group=1, kv_heads=3),
        Case(tokens=150, group=2, window=0),
        Case(tokens=150, group=8),
        Case(tokens=150, group=7, slots=32, window=32),
        Case(tokens=150, group=3, rotary_dim=64, window=5),
        Case(tokens=150, group=1, gates="extreme"),
        Case(tokens=150, group=2, gates="mixed", empty_slots="weight", documents=(0, 20, 150)),
        Case(documents=documents, group=2, empty_slots="mask", memory=(70,)),
        Case(batch=2, group=1, memory=(5, 90), empty_slots="weight", window=48, tokens=77),
        Case(tokens=600, window=300),
        Case(tokens=700, window=512, rotary_dim=0, documents=(0, 650, 700)),
        Case(tokens=150, slots=16),
        Case(tokens=150, slots=48),
        Case(tokens=150, slots=128),
        Case(tokens=150, slots=128, group=1, window=16),
        Case(tokens=150, slots=128, dtype="float16"),
        Case(tokens=150, slots=96, group=2),
        Case(tokens=150, slots=256),
        Case(tokens=150, slots=256, empty_slots="weight", documents=(0, 20, 150)),
        Case(tokens=150, key_dim=64, value_dim=64),
        Case(tokens=150, key_dim=64, value_dim=128, group=1),
        Case(tokens=100, key_dim=256, value_dim=256),
        Case(tokens=100, key_dim=256, value_dim=256, group=3, documents=(0, 50, 100), empty_slots="weight"),
        Case(dtype="float16"),
        Case(dtype="float16", gates="mixed", empty_slots="weight", memory=(80,)),
        Case(dtype="float32"),
        Case(dtype="float32", gates="mixed", documents=documents, empty_slots="weight", memory=(70,)),
        Case(dtype="float32", gates="extreme", key_dim=64, value_dim=64, group=1),
        Case(dtype="float32", tokens=100, key_dim=256, value_dim=256, group=2),
        Case(dtype="float32", tokens=100, group=8, slots=128),
        Case(tokens=9000, batch=2, gates="slow"),  # several slabs of the backward
        Case(tokens=17000, kv_heads=1, group=2, gates="mixed", documents=(0, 9000, 17000)),  # and of the forward
        Case(tokens=900, window=600),
        Case(tokens=900, window=600, batch=2, memory=(100, 700), empty_slots="weight"),
        Case(tokens=900, window=600, memory=(300,), documents=(0, 650, 650, 900), group=1),
        Case(tokens=300, window=None, group=8),
        Case(tokens=1, window=None, deterministic=False),
        Case(tokens=300, window=None, batch=2, empty_slots="mask", key_dim=64, value_dim=64),
        Case(tokens=300, window=None, documents=(0, 100, 300), rotary_dim=64),
        Case(tokens=300, window=None, deterministic=False),
        Case(tokens=517, window=None, deterministic=False, group=8, empty_slots="mask"),
        Case(tokens=300, window=None, deterministic=False, batch=2, group=1, key_dim=64, value_dim=64, dtype="float16"),
        Case(tokens=300, window=None, deterministic=False, documents=(0, 100, 300)),
    ]
    return found


def all_cases() -> list[Case | DecodeCase | SummaryCase]:
    return [*cases(), *decode_cases(), *summary_cases()]


def make_inputs(case: Case, seed: int) -> tuple[dict[str, Tensor], Memory | None, dict[str, Any]]:
    generator = torch.Generator("cuda").manual_seed(seed)
    dtype = getattr(torch, case.dtype)
    rotary_dim = case.key_dim if case.rotary_dim < 0 else case.rotary_dim

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda").to(dtype)

    def tokens(batch: int, count: int) -> dict[str, Tensor]:
        return {
            "q": normal(batch, count, case.kv_heads * case.group, case.key_dim),
            "k": normal(batch, count, case.kv_heads, case.key_dim),
            "v": normal(batch, count, case.kv_heads, case.value_dim),
            "g": make_gates(case.gates, (batch, count, case.kv_heads, case.slots), generator),
        }

    options: dict[str, Any] = {
        "window": case.window,
        "rope": 10000.0 ** (-torch.arange(0, rotary_dim, 2, device="cuda").double() / rotary_dim) if rotary_dim else None,
        "rope_attention_factor": 1.2,
        "empty_slots": case.empty_slots,
    }
    memory = None
    if case.memory:
        rows = []
        for seen in case.memory:
            _, row = nha_attention(**tokens(1, seen), **options, return_memory=True, backend="torch")
            rows.append(row)
        held = max(row.window_keys.shape[1] for row in rows)

        def stacked(name: str) -> Tensor:
            parts = [getattr(row, name) for row in rows]
            if name.startswith("window_"):  # rows that are not held must never be read
                parts = [torch.cat([part.new_full((1, held - part.shape[1], *part.shape[2:]), torch.nan), part], 1) for part in parts]
            return torch.cat(parts)

        names = [field.name for field in dataclasses.fields(Memory) if field.name != "window"]
        memory = Memory(**{name: stacked(name) for name in names}, window=case.window)
    if case.documents:
        options["cu_seqlens"] = torch.tensor(case.documents, dtype=torch.int32, device="cuda")
    return tokens(case.batch, case.tokens), memory, options


def run(inputs: dict[str, Tensor], memory: Memory | None, options: dict[str, Any], backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Outputs, then gradients (names that begin with d) of a fixed random projection of all outputs."""
    exact = dtype == torch.float64
    leaves = {name: (x.to(torch.float64) if exact else x).detach().clone().requires_grad_() for name, x in inputs.items()}
    given = memory
    if memory is not None:
        given = memory.map(lambda x: (x.double() if exact else x).detach().clone().requires_grad_() if x.is_floating_point() else x)
        fields = (field.name for field in dataclasses.fields(Memory))
        leaves_memory = {n: getattr(given, n) for n in fields if isinstance(getattr(given, n), Tensor)}
        leaves_memory = {n: x for n, x in leaves_memory.items() if x.requires_grad}
    else:
        leaves_memory = {}
    out, new = nha_attention(**leaves, memory=given, **options, return_memory=True, backend=backend)
    outputs = {"out": out, "slot_keys": new.slot_keys, "slot_values": new.slot_values, "slot_log_decay": new.slot_log_decay}
    generator = torch.Generator("cuda").manual_seed(7)
    loss = torch.zeros((), dtype=torch.float64, device="cuda")
    for name, x in outputs.items():
        weight = torch.randn(x.shape, generator=generator, device="cuda")
        # The log-decay grows with the sequence; the weight keeps its gradient from drowning the others.
        loss = loss + (x.double() * weight.to(inputs["q"].dtype).double()).sum() * (0.1 if name == "slot_log_decay" else 1.0)
    wanted = {**leaves, **leaves_memory}
    gradients = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    for name, gradient in zip(wanted, gradients, strict=True):
        outputs["d" + name] = torch.zeros_like(wanted[name]) if gradient is None else gradient
    return {name: x.detach() for name, x in outputs.items()}


def check(case: Case | DecodeCase | SummaryCase) -> dict[str, Any]:
    """Runs in a process of its own. `passed`, and `errors`, `refused` or `exception`."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    result: dict[str, Any] = {"case": case.name}
    began = time.time()
    seed = zlib.crc32(case.name.encode())
    try:
        if isinstance(case, DecodeCase):
            return {**result, **check_decode(case, seed), "seconds": round(time.time() - began, 1)}
        if isinstance(case, SummaryCase):
            return {**result, **check_summary(case, seed), "seconds": round(time.time() - began, 1)}
        dtype = getattr(torch, case.dtype)
        inputs, memory, options = make_inputs(case, seed)
        reason = refusal(**inputs, window=case.window)
        if reason is not None:
            return {**result, "passed": True, "refused": reason, "seconds": 0.0}
        flash = case.window is None or case.window > WIDEST_FUSED_WINDOW
        strict = flash and case.deterministic
        torch.use_deterministic_algorithms(True, warn_only=not strict)  # PyTorch's flash backward is deterministic only when it must be
        first = run(inputs, memory, options, "triton", dtype)
        second = run(inputs, memory, options, "triton", dtype)
        torch.use_deterministic_algorithms(True, warn_only=True)
        result["deterministic"] = not case.deterministic or all(torch.equal(first[name], second[name]) for name in first)
        exact = run(inputs, memory, options, "torch", torch.float64)
        result["errors"] = {name: relative_error(first[name], exact[name]) for name in first}
        tolerance = TOLERANCES[dtype]
        result["passed"] = result["deterministic"] and all(
            error <= tolerance[name.startswith("d")] for name, error in result["errors"].items()
        )
    except Exception as error:  # the other cases still run; the exit status says that this one failed
        result.update(passed=False, exception="".join(traceback.format_exception_only(error))[-600:])
    result["seconds"] = round(time.time() - began, 1)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output")
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--only", default="")
    parser.add_argument("--skip", default="-")
    arguments = parser.parse_args()
    chosen = [case for case in all_cases() if arguments.only in case.name and arguments.skip not in case.name]
    results = []
    with multiprocessing.get_context("spawn").Pool(min(arguments.workers, len(chosen)), maxtasksperchild=None) as pool:
        for result in pool.imap_unordered(check, chosen):
            results.append(result)
            worst = " ".join(f"{name}={error:.1e}" for name, error in result.get("errors", {}).items())
            verdict = "FAIL" if not result["passed"] else "none" if "refused" in result else "ok  "
            print(
                verdict,
                f"{result['seconds']:6.1f}s",
                result["case"],
                "|",
                worst,
                result.get("exception", result.get("refused", "")),
                flush=True,
            )
            if not result.get("deterministic", True):
                print("     not deterministic", flush=True)
    failed = [result["case"] for result in results if not result["passed"]]
    print(f"{len(results) - len(failed)} of {len(results)} cases passed on {torch.cuda.get_device_name()}")
    if arguments.output:
        with open(arguments.output, "w") as file:
            json.dump({"device": torch.cuda.get_device_name(), "torch": torch.__version__, "results": results}, file, indent=1)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
