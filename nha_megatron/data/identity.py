"""What a run reads, in a form that a checkpoint can keep and a later start can compare."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

from nha_megatron.config import RunConfig
from nha_megatron.data.token_files import Manifest, paths_of


def data_identity(config: RunConfig) -> dict[str, Any]:
    """`{"stages": [[corpus, ...], ...]}`: for each stage its corpora in their order, plain data.

    A corpus is known by the checksums of its tokens and boundaries, so that it may be moved, and by its share of the blend; its path is
    for people. Reads manifests only. Raises `ConfigError` when one is missing or damaged.
    """
    return {"stages": [[*_corpora(stage.config)] for stage in config.stages]}


def _corpora(config: RunConfig) -> list[dict[str, Any]]:
    blend = config.data.training_blend
    total = sum(entry.weight for entry in blend)
    corpora = []
    for entry in blend:
        manifest = Manifest.read(paths_of(entry.path)[2])
        # 12 digits: the same weights in another unit are the same blend.
        corpora.append(
            {"path": entry.path, "bin": manifest.bin.sha256, "idx": manifest.idx.sha256, "share": round(entry.weight / total, 12)}
        )
    return corpora


def data_changes(before: dict[str, Any], now: dict[str, Any], stages: int) -> list[str]:
    """How the first `stages` stages of two identities differ, one text for each corpus."""
    changes = []
    none: list[dict[str, Any]] = []
    for number, (old, new) in enumerate(zip_longest(before["stages"][:stages], now["stages"][:stages], fillvalue=none), 1):
        for was, is_ in zip_longest(old, new):
            if was is None or is_ is None or any(was[key] != is_[key] for key in ("bin", "idx", "share")):
                where = "" if stages == 1 else f"stage {number}: "
                changes.append(f"{where}{_describe(was)} became {_describe(is_)}")
    return changes


def _describe(corpus: dict[str, Any] | None) -> str:
    if corpus is None:
        return "nothing"
    return f"{corpus['path']} (sha256 {corpus['bin'][:12]}..., share {corpus['share']:g})"
