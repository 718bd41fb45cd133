"""What a run reads, in a form that a checkpoint can keep and a later start can compare."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any

from nha_megatron.config import ConfigError, RunConfig
from nha_megatron.data.token_files import Manifest, paths_of


@dataclass(frozen=True)
class TrainedTokens:
    """With what a model has learnt to begin and end a document: for its export."""

    tokenizer_sha256: str
    end_of_text: int
    bos: int | None  # None: documents begin with no token of their own


def trained_tokens(identity: dict[str, Any] | None) -> TrainedTokens | None:
    """What an identity says of its tokens. All corpora of a run agree.

    An identity of an earlier version does not say: then the manifest of its token files does, where they are still there and the same.
    Raises `ConfigError` when it is damaged.
    """
    try:
        corpus = next((corpus for stage in (identity or {"stages": []})["stages"] for corpus in stage), None)
        if corpus is None:
            return None
        if "end_of_text" in corpus:
            found: TrainedTokens | None = TrainedTokens(corpus["tokenizer_sha256"], corpus["end_of_text"], corpus["bos"])
        else:
            found = _of_token_files(corpus["path"], corpus["bin"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"what the checkpoint says of its data is damaged ({type(error).__name__}: {error})") from None
    known = found is None or (
        type(found.end_of_text) is int and type(found.bos) in (int, type(None)) and type(found.tokenizer_sha256) is str
    )
    if not known:
        raise ConfigError(f"what the checkpoint says of its data is damaged: {found}")
    return found


def _of_token_files(prefix: str, sha256: str) -> TrainedTokens | None:
    try:
        manifest = Manifest.read(paths_of(prefix)[2])
    except (ConfigError, OSError):
        return None
    return TrainedTokens(manifest.tokenizer_sha256, manifest.end_of_text, manifest.bos) if manifest.bin.sha256 == sha256 else None


def data_identity(config: RunConfig) -> dict[str, Any]:
    """`{"stages": [[corpus, ...], ...]}`: for each stage its corpora in their order, plain data.

    A corpus is known by the checksums of its tokens and boundaries, so that it may be moved, and by its share of the blend; its path is
    for people, its tokenizer for the export. Reads manifests only. Raises `ConfigError` when one is missing or damaged.
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
            {
                "path": entry.path,
                "bin": manifest.bin.sha256,
                "idx": manifest.idx.sha256,
                "share": round(entry.weight / total, 12),
                **asdict(TrainedTokens(manifest.tokenizer_sha256, manifest.end_of_text, manifest.bos)),
            }
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
