"""What an architecture chooses for a call: the sizes of the tiles that a program holds, and the options of the launches."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tiles:
    """Of the attention kernels. `chunk` tokens of a KV head are a program; `block` of them share a reference token for decays."""

    chunk: int
    block: int
    forward_slab: int  # chunks whose slots are in device memory at the same time, about
    backward_slab: int
    slots: int  # slots taken at a time
    window_rows: int  # rows of the window that a program of queries takes at a time
    key_rows: int  # rows of a program of the window's keys
    query_chunk: int  # tokens of a program of the window's gradient of the queries
    key_chunk: int  # tokens of queries that a program of the window's keys takes at a time
    scan_slots: int = 16  # the scan is elementwise in the state: small pieces that one warp holds need no barrier
    scan_columns: int = 128
    scan_warps: int = 1
    forward_warps: int = 4
    read_warps: int = 4
    query_warps: int = 4
    key_warps: int = 4
    scan_stages: int = 2
    forward_stages: int = 1
    read_stages: int = 1
    query_stages: int = 1
    key_stages: int = 2
    # Most registers of a thread, None for what the compiler takes: 168 leave room for three programs of four warps on a multiprocessor.
    forward_registers: int | None = None
    write_registers: int | None = None


@dataclass(frozen=True)
class DecodeTiles:
    """Of a decode step, whose programs take a piece of the memory each."""

    slots: int  # of a piece; M is a multiple of it
    query_rows: int  # new tokens times query heads of a group that are taken at a time
    window_rows: int  # rows of the window that are taken at a time
    stages: int
    registers: int | None  # most of a thread, None for what the compiler takes


@dataclass(frozen=True)
class SummaryTiles:
    """Of `slot_summary`."""

    chunk: int  # tokens
    slots: int  # slots taken at a time
    columns: int  # of keys beside values, taken at a time
    gate_stages: int
