"""Time of the collectives of context parallelism on a network of nodes: start + latency of the hops + bytes / bandwidth.

Ranks fill nodes in order. Inside a node they are joined by one link (NVLink), between nodes by one adapter a rank (InfiniBand).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from nha_megatron.config.base import ConfigError

Gather = Literal["ring", "doubling"]


@dataclass(frozen=True)
class Link:
    """What one rank can send, each way: bandwidth in GB/s (1e9 bytes), and the latency of a hop in microseconds."""

    gb_per_s: float
    latency_us: float

    def __post_init__(self) -> None:
        require_positive("bandwidth of a link in GB/s", self.gb_per_s)
        if not 0 <= self.latency_us < math.inf:
            raise ConfigError(f"latency of a link is {self.latency_us} us: give zero or more")

    def ms(self, num_bytes: float) -> float:
        """Milliseconds that the bytes alone take."""
        return num_bytes / self.gb_per_s * 1e-6


@dataclass(frozen=True)
class Network:
    """Two kinds of links and what a collective takes before anything moves.

    Attributes:
        inside, across: between two ranks of a node, and of two nodes.
        ranks_per_node: ranks that `inside` joins.
        rails: adapters of a node that one ring uses at the same time. NCCL lays rings over all of them where messages are large;
            1 is the cautious end.
        start_us: microseconds of each collective beside its hops.
    """

    inside: Link
    across: Link
    ranks_per_node: int = 8
    rails: int = 8
    start_us: float = 8.4

    def __post_init__(self) -> None:
        if self.ranks_per_node < 1 or not 1 <= self.rails <= self.ranks_per_node:
            raise ConfigError(
                f"{self.ranks_per_node} ranks in a node with {self.rails} adapters: give at least one of each, not more adapters than ranks"
            )
        if not 0 <= self.start_us < math.inf:
            raise ConfigError(f"start of a collective is {self.start_us} us: give zero or more")

    def all_gather_ms(self, num_bytes: float, ranks: int, algorithm: Gather = "ring") -> float:
        """`num_bytes` of every rank to every rank.

        ring: R - 1 hops of one part. Between nodes the ring runs over `rails` adapters at once, and its slowest link sets the pace.
        doubling: ceil(log2 R) steps, the parts that a rank sends double; between nodes every rank uses its own adapter.
        """
        self._check(num_bytes, ranks)
        if algorithm not in get_args(Gather):
            raise ConfigError(f"all-gather by {algorithm!r} is not known: choose {' or '.join(get_args(Gather))}")
        if ranks == 1 or num_bytes == 0:
            return 0.0
        if algorithm == "ring":
            crossings = math.ceil(ranks / self.ranks_per_node) - 1
            hops_us = (ranks - 1 - crossings) * self.inside.latency_us + crossings * self.across.latency_us
            slowest = self.inside.gb_per_s
            if crossings:
                slowest = min(slowest, self.rails * self.across.gb_per_s)
            return (self.start_us + hops_us) * 1e-3 + (ranks - 1) * num_bytes / slowest * 1e-6
        total, held = self.start_us * 1e-3, 1
        while held < ranks:
            link = self.inside if held < self.ranks_per_node else self.across
            total += link.latency_us * 1e-3 + link.ms(min(held, ranks - held) * num_bytes)
            held *= 2
        return total

    def scan_ms(self, num_bytes: float, ranks: int) -> float:
        """A log-step scan of `num_bytes`: ceil(log2 R) messages one after another, each over twice the distance."""
        return (ranks - 1).bit_length() * self.neighbour_ms(num_bytes, ranks)

    def neighbour_ms(self, num_bytes: float, ranks: int) -> float:
        """`num_bytes` from every rank to the next: the pairs that lie in two nodes are the slowest."""
        self._check(num_bytes, ranks)
        if ranks == 1 or num_bytes == 0:
            return 0.0
        link = self.inside if ranks <= self.ranks_per_node else self.across
        return (self.start_us + link.latency_us) * 1e-3 + link.ms(num_bytes)

    def all_to_all_ms(self, num_bytes: float, ranks: int) -> float:
        """`num_bytes` of every rank, in equal parts to the R - 1 others; what leaves the node goes through the rank's own adapter."""
        self._check(num_bytes, ranks)
        if ranks == 1 or num_bytes == 0:
            return 0.0
        leaving = max(ranks - self.ranks_per_node, 0) / (ranks - 1)
        latency_us = self.across.latency_us if leaving else self.inside.latency_us
        return (self.start_us + latency_us) * 1e-3 + self.inside.ms((1 - leaving) * num_bytes) + self.across.ms(leaving * num_bytes)

    def _check(self, num_bytes: float, ranks: int) -> None:
        if ranks < 1 or not 0 <= num_bytes < math.inf:
            raise ConfigError(f"a collective of {num_bytes} bytes over {ranks} ranks: give zero bytes or more, and at least one rank")


def require_positive(what: str, value: float) -> None:
    """Raises `ConfigError` unless 0 < value < infinity."""
    if not 0 < value < math.inf:
        raise ConfigError(f"{what} is {value}: give a finite number above zero")
