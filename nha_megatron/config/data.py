"""Section `data`: what is read, and how it is cut into samples."""

from typing import Annotated, Literal

from pydantic import Field

from .base import NonNegative, PathString, Positive, PositiveReal, Section


class BlendEntry(Section):
    """One corpus of a weighted blend."""

    path: PathString
    """Prefix of the token files: PREFIX.bin, PREFIX.idx and PREFIX.json."""
    weight: PositiveReal
    """Share of the samples, relative to the sum of all weights."""


Blend = Annotated[list[BlendEntry], Field(min_length=1)]


class DataConfig(Section):
    """Token files and the order of samples. Relative paths start at the working directory."""

    path: PathString | Blend
    """Prefix of the training token files, or a weighted blend of several."""
    validation: PathString | Blend | None = None
    """The same for validation; null: no validation."""
    tokenizer: PathString | None = None
    """A Hugging Face tokenizer directory; needed for export and for text samples."""
    sequence_length: Positive
    """Tokens of one sample, over all context ranks."""
    packing: Literal["none", "concat", "best_fit"] = "none"
    """none: samples are cut from the stream of documents and attention crosses end-of-text. concat: the same cut, but attention, slots and
    positions start anew at every document. best_fit: so too, but documents are packed whole where they fit, and the rest is padding."""
    bos: Literal["none", "add"] | None = None
    """Whether documents begin with the tokenizer's bos token. That is decided when they are prepared (`nha-megatron prepare --bos`): null
    takes what the token files say, and a value that they contradict is refused."""
    seed: NonNegative = 0
    """Seed of the sample order."""
    verify: Literal["sizes", "sampled", "full"] = "sampled"
    """How far the token files are compared with their checksums at every start, on every node: their sizes, 64 MiB of each file spread over
    it, or every byte (minutes for each hundred gigabytes)."""

    @property
    def isolates_documents(self) -> bool:
        """Whether attention, slots and positions start anew at every document."""
        return self.packing != "none"

    @property
    def training_blend(self) -> tuple[BlendEntry, ...]:
        """`path` as a blend, a single path with weight 1."""
        return _as_blend(self.path)

    @property
    def validation_blend(self) -> tuple[BlendEntry, ...]:
        """`validation` as a blend, empty without validation."""
        return () if self.validation is None else _as_blend(self.validation)


def _as_blend(path: str | list[BlendEntry]) -> tuple[BlendEntry, ...]:
    return (BlendEntry(path=path, weight=1.0),) if isinstance(path, str) else tuple(path)
