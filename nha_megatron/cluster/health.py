"""Start-up health check: every device, disk, clock and link of a job, before it trains. `nha-megatron health CONFIG`.

Two rounds. First each rank tests its own device and disk and says so in the key-value store: no collective runs yet, so a rank that
hangs or fails is named by rank 0 instead of hanging the others. Then clocks, sum and bandwidths, with a short timeout.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from nha_megatron.cluster.health_report import Finding, RankReport, judge, table
from nha_megatron.cluster.versions import installed_versions
from nha_megatron.config import ConfigError, RunConfig
from nha_megatron.engine.device import backend_for, choose_device
from nha_megatron.engine.environment import meeting_place, read_place

PATIENCE_S = 120.0
DISK_BYTES = 16 * 2**20


def check_health(config: RunConfig, say: Callable[[str], None] = print) -> bool:
    """Tests all nodes of the job; rank 0 says one table and what is wrong. True: nothing is broken. Collective."""
    store, rank, world = _meet()
    sound = _check(config, store, rank, world, say)
    with contextlib.suppress(dist.DistError):  # rank 0 has gone, and its store with it
        store.add("left", 1)
        if rank == 0:  # the others may still be reading its answer
            deadline = time.monotonic() + 10
            while store.add("left", 0) < world and time.monotonic() < deadline:
                time.sleep(0.05)
    return sound


def _check(config: RunConfig, store: dist.Store, rank: int, world: int, say: Callable[[str], None]) -> bool:
    report = measure_alone(config, rank)
    store.set(f"local/{rank}", json.dumps(asdict(report)))
    if rank == 0:
        reports = _collect(store, "local", world)
        broken = [finding for finding in judge(reports) if finding.broken]
        if broken:
            _conclude(reports, broken, None, say)
        store.set("go", "no" if broken else "yes")
    if not _yes(store, "go"):
        return False

    report, bus = _measure_together(report, world, config, store)
    store.set(f"together/{rank}", json.dumps(asdict(report)))
    if rank == 0:
        reports = _collect(store, "together", world)
        findings = judge(reports)
        _conclude(reports, findings, bus, say)
        store.set("verdict", "no" if any(finding.broken for finding in findings) else "yes")
    return _yes(store, "verdict")


def measure_alone(config: RunConfig, rank: int) -> RankReport:
    """What can be tested without the other ranks."""
    report = RankReport(rank, socket.gethostname(), versions=installed_versions())
    try:
        device = choose_device(config.training.device)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        report = replace(report, device=name)
        report = replace(report, matmul_tflops=_matmul_rate(device))
        return replace(report, disk_mb_per_s=_disk_rate(Path(config.logging.directory), rank))
    except (ConfigError, RuntimeError, OSError) as error:  # torch's device errors are RuntimeErrors
        return replace(report, error=" ".join(str(error).split())[:300])


def partners(node: int, nodes: int) -> list[int]:
    """Nodes to exchange with, in two rounds, so that a slow node is slow with both and its partners are not. -1: none in that round."""
    neighbour = node ^ 1
    rounds = [neighbour if neighbour < nodes else -1]
    if nodes > 2:
        shifted = (node - 1) % nodes
        neighbour = shifted ^ 1
        rounds.append((neighbour + 1) % nodes if neighbour < nodes else -1)
    return rounds


def _meet() -> tuple[dist.Store, int, int]:
    if meeting_place() is None:
        return dist.HashStore(), 0, 1
    store, rank, world = next(dist.rendezvous("env://", timeout=timedelta(seconds=PATIENCE_S)))
    return dist.PrefixStore("health", store), rank, world


def _collect(store: dist.Store, name: str, world: int) -> list[RankReport]:
    """Reports of all ranks; a rank that says nothing in time gets one that says so."""
    deadline = time.monotonic() + PATIENCE_S
    reports = []
    for rank in range(world):
        try:
            value = _wait(store, f"{name}/{rank}", max(0.1, deadline - time.monotonic()))
            reports.append(RankReport(**json.loads(value)))
        except dist.DistStoreError:
            host = f"number {rank // read_place().local_world_size}"
            reports.append(RankReport(rank, host, error=f"says nothing for {PATIENCE_S:.0f} s: its process hangs, or its host is cut off"))
    return reports


def _yes(store: dist.Store, key: str) -> bool:
    """Rank 0's answer; no when it gives none."""
    try:
        return _wait(store, key, 2 * PATIENCE_S) == b"yes"
    except dist.DistError:
        return False


def _wait(store: dist.Store, key: str, seconds: float) -> bytes:
    store.wait([key], timedelta(seconds=seconds))
    return store.get(key)


def _conclude(reports: list[RankReport], findings: list[Finding], bus: float | None, say: Callable[[str], None]) -> None:
    say(table(reports, findings))
    if bus is not None:
        say(f"all-reduce over {len(reports)} ranks: right, {bus:.3g} GB/s bus bandwidth")
    for finding in findings:
        say(str(finding))
    sys.stdout.flush()


def _matmul_rate(device: torch.device) -> float:
    """TFLOP/s of a bf16 (CPU: fp32) matrix product whose value is checked: ones times ones."""
    cuda = device.type == "cuda"
    size, repeats = (8192, 20) if cuda else (256, 10)
    ones = torch.ones(size, size, dtype=torch.bfloat16 if cuda else torch.float32, device=device)
    product = ones @ ones  # warms up
    if not bool((product == size).all()):  # a power of two: exact in bf16
        raise RuntimeError("a matrix product came out wrong: the device is faulty")
    seconds = _timed(lambda: [ones @ ones for _ in range(repeats)], device)
    return 2 * size**3 * repeats / seconds / 1e12


def _disk_rate(folder: Path, rank: int) -> float:
    """MB/s written, synced and read back in the run's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".health_{socket.gethostname()}_{rank}"
    content = os.urandom(DISK_BYTES)
    started = time.perf_counter()
    try:
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if path.read_bytes() != content:
            raise OSError(f"{folder} gives back other bytes than were written")
    finally:
        path.unlink(missing_ok=True)
    return DISK_BYTES / (time.perf_counter() - started) / 1e6


def _measure_together(report: RankReport, world: int, config: RunConfig, store: dist.Store) -> tuple[RankReport, float | None]:
    device = choose_device(config.training.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend_for(device),
        store=dist.PrefixStore("group", store),
        rank=report.rank,
        world_size=world,
        timeout=timedelta(seconds=PATIENCE_S),
        device_id=device if device.type == "cuda" else None,
    )
    try:
        report = replace(report, clock_offset_s=_clock_offset(device))
        _require_shared(Path(config.logging.directory), report.rank, store)
        bus = _all_reduce_rate(report.rank, world, device)
        network = _network_rate(report.rank, world, device)
        return replace(report, network_gb_per_s=network), bus
    except (RuntimeError, OSError) as error:
        return replace(report, error=" ".join(str(error).split())[:300]), None
    finally:
        dist.destroy_process_group()


def _clock_offset(device: torch.device) -> float:
    """Seconds that this host's clock is ahead of the median; the barrier's own skew, milliseconds, is in it."""
    dist.barrier()
    now = torch.tensor([time.time()], dtype=torch.float64, device=device)
    clocks = [torch.empty_like(now) for _ in range(dist.get_world_size())]
    dist.all_gather(clocks, now)
    return float(now - torch.stack(clocks).median())


def _require_shared(folder: Path, rank: int, store: dist.Store) -> None:
    """Raises OSError where the run's folder is not the one that rank 0 writes to: a checkpoint in parts on several disks is none."""
    path = folder / f".health_shared_{os.getpid()}" if rank == 0 else None
    if path is not None:
        path.touch()
        store.set("shared", path.name)
    else:
        name = store.get("shared").decode()
        deadline = time.monotonic() + 5  # network file systems show new names late
        while not (found := (folder / name).exists()) and time.monotonic() < deadline:
            time.sleep(0.1)
    dist.barrier()
    if path is not None:
        path.unlink()
    elif not found:
        raise OSError(f"{folder} does not show what rank 0 wrote there: it must be on a file system that all nodes share")


def _all_reduce_rate(rank: int, world: int, device: torch.device) -> float:
    """GB/s bus bandwidth (2 (n-1)/n bytes over time) of an all-reduce whose sum is checked."""
    elements = (64 if device.type == "cuda" else 1) * 2**20
    values = torch.full((elements,), float(rank + 1), device=device)
    dist.all_reduce(values)
    expected = world * (world + 1) / 2  # exact in fp32 up to 5000 ranks
    if not bool((values == expected).all()):
        raise RuntimeError(f"all-reduce gave {values[0].item()} where {expected} is right: a link or a device corrupts data")
    repeats = 5
    seconds = _timed(lambda: [dist.all_reduce(values) for _ in range(repeats)], device)
    return 2 * (world - 1) / world * 4 * elements * repeats / seconds / 1e9


def _network_rate(rank: int, world: int, device: torch.device) -> float | None:
    """GB/s to the faster of the partner nodes; None on one node."""
    local = read_place().local_world_size
    nodes = world // local
    if nodes == 1:
        return None
    elements = (64 if device.type == "cuda" else 1) * 2**20
    sent, received = torch.full((elements,), float(rank), device=device), torch.empty(elements, device=device)
    best = None
    for partner in partners(rank // local, nodes):
        dist.barrier()
        if partner < 0:
            continue
        peer = partner * local + rank % local
        for timed in (False, True):
            seconds = _timed(partial(_exchange, sent, received, peer), device)
            if timed:
                best = max(best or 0.0, 4 * elements / seconds / 1e9)
        if not bool((received == peer).all()):
            raise RuntimeError(f"data from rank {peer} arrived changed: a link or a device corrupts data")
    return best


def _exchange(sent: torch.Tensor, received: torch.Tensor, peer: int) -> None:
    for request in dist.batch_isend_irecv([dist.P2POp(dist.isend, sent, peer), dist.P2POp(dist.irecv, received, peer)]):
        request.wait()


def _timed(action: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
