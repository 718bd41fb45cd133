"""Cases of check.py for the operator: what the launch configurations need, and what is known to be hard.

Listed by hand: conventions, documents, memories, gates, head sizes and groups. Added by enumeration: one case for every choice of tiles,
number of query heads (as a power of two), dtype and K = V that dispatch can make and no case by hand has, with shapes drawn from a seed.
"""

import dataclasses
import functools
import itertools
import random
import zlib

import torch

from nha_kernels.triton.architectures import architecture_of
from nha_kernels.triton.architectures.tiles import Tiles
from nha_kernels.triton.dispatch import refusal_of_shape

# Of this machine's GPU; without one, of the first that was checked.
_ARCHITECTURE = architecture_of(torch.cuda.get_device_capability() if torch.cuda.is_available() else None)
_DOCUMENTS = (0, 37, 37, 38, 111, 200)


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

    @property
    def wide(self) -> bool:
        """Whether a library attends to the window, or would if a fast one were installed."""
        served = self.dtype != "float32" and self.key_dim == self.value_dim
        return self.window is None or (served and self.window > 512)

    @property
    def cost(self) -> float:
        """Rough time of compiling, to begin with the longest."""
        if self.window is None and not self.memory:
            return 0.0
        wide = max(self.key_dim, self.value_dim) > 128
        exact = 1.0 + self.slots / 32 if self.dtype == "float32" else 1.0
        return exact * (1.5 if wide else 1.0) + self.tokens / 1e4 + (0.5 if self.documents else 0.0)


def _listed() -> list[Case]:
    documents = _DOCUMENTS
    return [
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
        Case(tokens=1100, window=1023),
        Case(tokens=1500, window=1200, key_dim=64, documents=(0, 1300, 1500)),  # no library takes K that is not V
        Case(dtype="float32", tokens=1300, window=1100, group=2),  # nor float32
        Case(tokens=700, window=512, rotary_dim=0, documents=(0, 650, 700)),
        Case(tokens=150, slots=16),
        Case(tokens=150, slots=48),
        Case(tokens=150, slots=128),
        Case(tokens=150, slots=128, group=1, window=16),
        Case(tokens=150, slots=128, dtype="float16"),
        Case(tokens=150, slots=96, group=2),
        Case(tokens=131, slots=80, window=40, empty_slots="weight"),
        Case(tokens=75, slots=240, group=2, window=20, empty_slots="mask", memory=(50,)),
        Case(dtype="float16", tokens=75, slots=208, group=5, memory=(30,)),
        Case(tokens=99, group=9),  # parts of 5 and 4 heads, with different tiles
        Case(tokens=99, group=12, window=32),
        Case(tokens=99, group=16, slots=32, memory=(20,), empty_slots="weight"),
        Case(dtype="float32", tokens=70, group=6, slots=32, window=20),
        Case(tokens=70, group=8, key_dim=256, value_dim=256, window=32),
        Case(tokens=99, group=4, key_dim=256, value_dim=64, window=70),
        Case(tokens=99, group=3, key_dim=64, value_dim=256, slots=96, memory=(40,)),
        Case(tokens=99, group=4, key_dim=128, value_dim=64, empty_slots="mask"),
        Case(dtype="float16", tokens=99, group=1, key_dim=128, value_dim=64, window=31),
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
        Case(dtype="float32", tokens=100, group=8, slots=128),
        Case(dtype="float32", tokens=70, group=1, key_dim=64, value_dim=64, slots=256),
        Case(dtype="float32", tokens=70, group=1, key_dim=256, value_dim=256, empty_slots="weight", documents=(0, 20, 70), memory=(40,)),
        Case(dtype="float32", tokens=70, group=3, key_dim=256, value_dim=256, slots=32, window=20),  # one head at a time
        Case(dtype="float32", tokens=60, group=1, key_dim=256, value_dim=64, slots=16, gates="mixed"),
        Case(dtype="float32", tokens=60, group=2, key_dim=64, value_dim=256, slots=96, window=0),
        # The forward for Hopper GPUs, which also takes the first three: masked slots, several rows, tiles of a KV head, slabs and segments.
        Case(batch=3, tokens=201, kv_heads=3, empty_slots="mask"),
        Case(batch=2, tokens=129, group=8, gates="mixed", empty_slots="mask"),
        Case(tokens=1, kv_heads=1),
        Case(tokens=64, group=16, kv_heads=1),
        Case(tokens=40000, kv_heads=1, gates="mixed"),
        Case(tokens=9000, batch=2, gates="slow"),  # several slabs of the backward
        Case(tokens=17000, kv_heads=1, group=2, gates="mixed", documents=(0, 9000, 17000)),  # and of the forward
        Case(tokens=900, window=600),
        Case(tokens=1500, window=1100),
        Case(tokens=1500, window=1100, batch=2, memory=(100, 1300), empty_slots="weight"),
        Case(tokens=1500, window=1100, memory=(300,), documents=(0, 1200, 1200, 1500), group=1),
        Case(tokens=1300, window=1100, group=12, slots=32),
        Case(tokens=333, window=2000, memory=(2500,), dtype="float16"),
        Case(tokens=300, window=None, memory=(60,), documents=(0, 100, 300)),
        Case(tokens=5, window=None, batch=2, memory=(60, 1000), empty_slots="weight"),
        Case(tokens=133, window=None, batch=2, memory=(300, 1), group=1),
        Case(tokens=300, window=None, memory=(700,), key_dim=64, value_dim=64, dtype="float16", empty_slots="mask", group=2),
        Case(tokens=200, window=None, key_dim=96, value_dim=96, group=16, slots=24),
        Case(tokens=300, window=None, group=8),
        Case(tokens=1, window=None, deterministic=False),
        Case(tokens=300, window=None, batch=2, empty_slots="mask", key_dim=64, value_dim=64),
        Case(tokens=300, window=None, documents=(0, 100, 300), rotary_dim=64),
        Case(tokens=300, window=None, deterministic=False),
        Case(tokens=517, window=None, deterministic=False, group=8, empty_slots="mask"),
        Case(tokens=300, window=None, deterministic=False, batch=2, group=1, key_dim=64, value_dim=64, dtype="float16"),
        Case(tokens=300, window=None, deterministic=False, documents=(0, 100, 300)),
        *(Case(tokens=101, group=group, key_dim=256, value_dim=256, window=32) for group in (1, 2)),
        Case(tokens=60, group=1, key_dim=256, value_dim=256, window=32, documents=(0, 20, 60), memory=(40,)),
        Case(tokens=60, group=2, key_dim=256, value_dim=128, slots=128, dtype="float16"),
        *(Case(tokens=101, group=group, slots=32, window=32) for group in (1, 2)),
        Case(tokens=101, group=1, slots=32, empty_slots="weight", documents=(0, 20, 101), memory=(40,)),
        Case(tokens=130, group=2, slots=32, gates="mixed"),
        *(Case(tokens=101, group=group, slots=16, window=window) for group in (1, 2) for window in (0, 32)),
        *(Case(tokens=101, group=group, slots=slots, key_dim=64, value_dim=64) for group in (1, 2) for slots in (16, 32)),
        Case(dtype="float16", tokens=101, group=1, slots=16, documents=(0, 20, 101), memory=(40,)),
        Case(tokens=60, group=5, slots=16, key_dim=256, value_dim=256, empty_slots="weight"),  # parts of 3 and 2 heads
        # Kernels are compiled for lengths that are multiples of 16, too.
        *(Case(tokens=256, group=group) for group in (1, 2, 4, 8)),
        *(Case(tokens=192, group=group, memory=(100,), documents=(0, 50, 192), empty_slots="weight") for group in (1, 2, 4, 8)),
        *(Case(tokens=256, group=group, window=0) for group in (1, 4)),
        *(Case(tokens=256, group=group, slots=128) for group in (1, 4)),
        *(Case(tokens=256, group=group, slots=32) for group in (1, 2, 4)),
        Case(dtype="float16", batch=2, tokens=192, memory=(100, 70)),
        Case(dtype="float32", batch=2, tokens=192, memory=(100, 70)),
        Case(tokens=256, key_dim=64, value_dim=64),
        Case(tokens=256, key_dim=256, value_dim=256),
        Case(tokens=1536, window=1200),
        Case(tokens=8192, batch=2),
        Case(tokens=32768, kv_heads=1, group=1, gates="mixed"),
        # Slots that are alike: little is left of the gradient of the queries.
        *(Case(tokens=119, group=7, window=window, rotary_dim=64, empty_slots="mask", gates="extreme") for window in (0, 1, 5)),
        Case(dtype="float16", tokens=119, group=2, slots=128, window=0, empty_slots="weight", gates="extreme"),
        Case(tokens=119, group=1, slots=48, window=0, gates="extreme", documents=(0, 40, 119)),
    ]


def shapes(case: Case) -> list[torch.Tensor]:
    """Queries, keys, values and log-gates, without memory."""
    sizes = ((case.group, case.key_dim), (1, case.key_dim), (1, case.value_dim), (1, case.slots))
    return [torch.empty(1, 200, heads, channels, dtype=getattr(torch, case.dtype), device="meta") for heads, channels in sizes]


Configuration = tuple[str, int | None, Tiles, int]


def _configuration(case: Case) -> Configuration:
    """What kernels are compiled for, but for M and a K that is not V: dtype, K = V, tiles, and the power of two that holds the group."""
    q, k, v, g = shapes(case)
    tiles = _ARCHITECTURE.attention_tiles(q, k, v, g, case.window or 0)
    # The slabs follow from the length.
    tiles = dataclasses.replace(tiles, forward_slab=0, backward_slab=0)
    return case.dtype, case.key_dim if case.key_dim == case.value_dim else None, tiles, 1 << (case.group - 1).bit_length()


@functools.cache
def configurations() -> dict[Configuration, list[Case]]:
    """Every one that dispatch can choose, and sizes that lead to it."""
    found: dict[Configuration, list[Case]] = {}
    sizes = itertools.product(("bfloat16", "float16", "float32"), (64, 128, 256), (64, 128, 256), range(1, 9), (16, 32, 48, 64, 128, 256))
    for (dtype, key_dim, value_dim, group, slots), window in itertools.product(sizes, (0, 17, 33)):
        case = Case(dtype=dtype, key_dim=key_dim, value_dim=value_dim, group=group, slots=slots, window=window, kv_heads=1)
        q, k, v, g = shapes(case)
        if refusal_of_shape(q, k, v, g) is None and group <= _ARCHITECTURE.largest_group(q, v):
            found.setdefault(_configuration(case), []).append(case)
    return found


def covered(listed: list[Case]) -> set[Configuration]:
    """Configurations of the cases in which every kernel runs: the library attends to wider windows, larger groups run in parts."""
    return {_configuration(case) for case in listed if not case.wide and case.group <= 8}


def _drawn(sizes: list[Case]) -> Case:
    """One of the sizes, with a shape drawn from a seed that these sizes give: the same in every run."""
    generator = random.Random(zlib.crc32(sizes[0].name.encode()))
    case = generator.choice(sizes)
    if case.dtype == "float32":
        case = dataclasses.replace(case, slots=min(case.slots, 128))  # more compile for minutes: one case with 256 is listed
    # Kernels are compiled for lengths that are multiples of 16 and for others.
    tokens, batch = generator.choice((2 * generator.randint(30, 90) + 1, 16 * generator.randint(3, 12))), generator.choice((1, 1, 2))
    documents: tuple[int, ...] = ()
    if batch == 1 and generator.random() < 0.5:
        documents = (0, *sorted(generator.sample(range(1, tokens), 2)), tokens)
    window = {0: generator.choice((0, 1, 7, 16)), 17: generator.choice((17, 24, 32)), 33: generator.choice((33, 48, 65))}[case.window or 0]
    return dataclasses.replace(
        case,
        tokens=tokens,
        batch=batch,
        kv_heads=generator.choice((1, 2, 3)),
        window=window,
        documents=documents,
        memory=tuple(generator.randint(1, 90) for _ in range(batch)) if generator.random() < 0.4 else (),
        empty_slots=generator.choice(("attend", "mask", "weight")),
        gates=generator.choice(("usual", "usual", "slow", "extreme", "mixed")),
        rotary_dim=generator.choice((-1, -1, 0, case.key_dim // 2)),
    )


def cases() -> list[Case]:
    listed = _listed()
    found = covered(listed)
    return listed + [_drawn(sizes) for configuration, sizes in configurations().items() if configuration not in found]
