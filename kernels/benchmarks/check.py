"""Compares the triton backend on this GPU with the torch backend in float64, forward and every gradient.

    PYTHONPATH=kernels python kernels/benchmarks/check.py [--only PATTERN] [--skip PATTERN] [--jobs 16] [--output results.json]
    PYTHONPATH=kernels python kernels/benchmarks/check.py --library flash-attn-4  # wide and full windows by this library

Cases cover every choice of tiles (check_cases.py); what dispatch refuses is listed with the reason and not run. Outputs start as NaN, and
every case runs twice and must give the same bits, except those of kernels that are not deterministic. One line a case; exit status 1 when
a case is outside of its tolerance, 2 without a GPU (`--list` needs none). Compiling dominates the time, so cases are spread over processes,
those that compile longest first.
"""

import argparse
import dataclasses
import functools
import json
import multiprocessing
import os
import pathlib
import re
import sys
import time
import traceback
import zlib
from typing import Any

import torch
import triton
from check_cases import Case, cases
from check_decode import DecodeCase, check_decode, decode_cases
from check_summary import SummaryCase, check_summary, summary_cases
from compare import TOLERANCES, make_gates, relative_error, require_cuda_device
from torch import Tensor

from nha_kernels import Memory, explain_dispatch, nha_attention
from nha_kernels.triton.libraries.choice import prefer_library


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


def check(case: Case | DecodeCase | SummaryCase, library: str | None = None) -> dict[str, Any]:
    """Runs in a process of its own. `passed`, and `errors`, `refused` or `exception`. `library`: who attends to wide and full windows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    result: dict[str, Any] = {"case": case.name}
    began = time.time()
    seed = zlib.crc32(case.name.encode())
    try:
        if isinstance(case, DecodeCase):
            result |= check_decode(case, seed)
        elif isinstance(case, SummaryCase):
            result |= check_summary(case, seed)
        else:
            with prefer_library(library if case.wide else None):
                result |= _check_operator(case, seed)
    except Exception as error:  # the other cases still run; the exit status says that this one failed
        result.update(passed=False, exception="".join(traceback.format_exception_only(error))[-600:])
    result["seconds"] = round(time.time() - began, 1)
    return result


def _check_operator(case: Case, seed: int) -> dict[str, Any]:
    dtype = getattr(torch, case.dtype)
    inputs, memory, options = make_inputs(case, seed)
    asked = {"window": case.window, "cu_seqlens": options.get("cu_seqlens"), "memory": memory}
    explanation = explain_dispatch(**inputs, **asked)
    if explanation.startswith("torch: "):
        return {"passed": True, "refused": explanation.removeprefix("torch: ")}
    # Libraries' backward passes are deterministic only when they must be.
    torch.use_deterministic_algorithms(True, warn_only=not (case.wide and case.deterministic))
    first = run(inputs, memory, options, "triton", dtype)
    second = run(inputs, memory, options, "triton", dtype)
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic = not case.deterministic or all(torch.equal(first[name], second[name]) for name in first)
    exact = run(inputs, memory, options, "torch", torch.float64)
    errors = {name: relative_error(first[name], exact[name]) for name in first}
    outputs, gradients = TOLERANCES[dtype]
    allowed = {name: gradients if name.startswith("d") else outputs for name in errors}
    if case.window == 1 and case.gates == "extreme" and dtype != torch.float32:
        # One row, read through slots that are all alike: <d_out, out> of a rounded output alone leaves up to 1.3e-2 of what remains.
        allowed["dwindow_keys"] = 1.5e-2
    passed = deterministic and all(error <= allowed[name] for name, error in errors.items())
    return {"passed": passed, "deterministic": deterministic, "errors": errors, "dispatch": explanation}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="JSON file of all results")
    parser.add_argument("--jobs", type=int, default=min(16, os.cpu_count() or 1), help="processes; compiling dominates the time")
    parser.add_argument("--only", default="", metavar="PATTERN", help="regular expression that a case's name must match somewhere")
    parser.add_argument("--skip", default="", metavar="PATTERN", help="the same, for cases to leave out")
    parser.add_argument(
        "--library",
        dest="attention_library",
        help="who attends to wide and full windows; without it dispatch's choice. Then only these cases run",
    )
    parser.add_argument("--list", action="store_true", help="print the cases and run nothing")
    arguments = parser.parse_args()
    chosen = [case for case in all_cases() if re.search(arguments.only, case.name)]
    chosen = [case for case in chosen if not (arguments.skip and re.search(arguments.skip, case.name))]
    if arguments.attention_library:
        chosen = [case for case in chosen if isinstance(case, Case) and case.wide]
    if arguments.list:
        print("\n".join(case.name for case in chosen))
        return
    if not chosen:
        sys.exit("no case has such a name; --list prints them")
    require_cuda_device()
    chosen.sort(key=lambda case: -case.cost if isinstance(case, Case) else -0.5)  # what takes longest begins first
    began = time.time()
    results = []
    work = functools.partial(check, library=arguments.attention_library)
    with multiprocessing.get_context("spawn").Pool(min(arguments.jobs, len(chosen))) as pool:
        for result in pool.imap_unordered(work, chosen):
            results.append(result)
            print(line(result), flush=True)
    failed = [result["case"] for result in results if not result["passed"]]
    refused = sum("refused" in result for result in results)
    ran = len(results) - refused
    print(f"{ran - len(failed)} of {ran} cases passed, {refused} refused, on {torch.cuda.get_device_name()}, {time.time() - began:.0f} s")
    if arguments.output:
        summary = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__, "results": results}
        pathlib.Path(arguments.output).write_text(json.dumps(summary, indent=1) + "\n")
    sys.exit(bool(failed))


def line(result: dict[str, Any]) -> str:
    verdict = "FAIL" if not result["passed"] else "none" if "refused" in result else "ok  "
    worst = " ".join(f"{name}={error:.1e}" for name, error in result.get("errors", {}).items())
    notes = [worst, result.get("exception", result.get("refused", "")).replace("\n", " ")]
    if not result.get("deterministic", True):
        notes.append("not deterministic")
    return f"{verdict} {result['seconds']:6.1f}s {result['case']} | {' '.join(filter(None, notes))}"


if __name__ == "__main__":
    main()
