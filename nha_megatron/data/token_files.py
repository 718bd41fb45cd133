"""Token files: Megatron's indexed format (`PREFIX.bin`, `PREFIX.idx`) with a manifest (`PREFIX.json`) beside it.

The manifest says what the two binary files cannot: which tokenizer made them, how many documents and tokens they hold,
and the size and checksum that each file must have. It is written last, so a set with a manifest is complete.
"""

import dataclasses
import json
import os
import struct
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from nha_megatron.config import ConfigError
from nha_megatron.config.json_text import read_json
from nha_megatron.data.checksum import file_sha256, sampled_sha256
from nha_megatron.publish import aside, sync

FORMAT_VERSION = 1

# The index stores sequence lengths in 32 bits. A longer document is stored as several sequences.
MAX_SEQUENCE_TOKENS = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """Size in bytes and SHA-256 (hex) of one file, of all its bytes and of samples (data/checksum.py)."""

    bytes: int
    sha256: str
    sampled_sha256: str | None = None  # None in files made before there were samples

    @classmethod
    def of(cls, path: Path) -> "FileRecord":
        return cls(path.stat().st_size, file_sha256(path), sampled_sha256(path))


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a set of token files holds and what it was made from."""

    format_version: int
    documents: int
    tokens: int  # end-of-text tokens included
    dtype: str  # "uint16" or "int32"
    max_token_id: int
    end_of_text: int
    tokenizer: str  # the directory at the time of writing: information only, the hash decides
    tokenizer_sha256: str  # of tokenizer.json
    source: str
    bin: FileRecord
    idx: FileRecord
    bos: int | None = None  # token that begins every document; None: nothing does

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Raises ConfigError if the file is missing, is not JSON, or has other fields than this class."""
        prefix = str(path).removesuffix(".json")
        if not path.exists():
            raise ConfigError(f"token files {prefix!r}: there is no manifest {path.name}. {how_to_make(prefix)}")
        try:
            fields = read_json(path.read_text(encoding="utf-8"))
            version = fields["format_version"]
            if version != FORMAT_VERSION:
                raise ConfigError(
                    f"token files: {path} has format version {version}, this program reads {FORMAT_VERSION}. "
                    "Prepare the data again with `nha-megatron prepare`."
                )
            manifest = cls(**{**fields, "bin": FileRecord(**fields["bin"]), "idx": FileRecord(**fields["idx"])})
            for part in (manifest, manifest.bin, manifest.idx):
                _require_types(part)
        except OSError as error:
            raise ConfigError(f"token files: the manifest {path} cannot be read ({error.strerror}). Check its rights.") from error
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(
                f"token files: the manifest {path} cannot be read ({error}). Prepare the data again with `nha-megatron prepare`."
            ) from error
        return manifest


def _require_types(record: Manifest | FileRecord) -> None:
    """Raises TypeError for what only a hand, or a disk, can have written."""
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if field.type is int and (type(value) is not int or not -1 <= value < 2**63):
            raise TypeError(f"{field.name} is not a count of 64 bits")
        if (field.type is str and not isinstance(value, str)) or (field.type == str | None and not isinstance(value, str | None)):
            raise TypeError(f"{field.name} is {type(value).__name__}, not text")
        if field.name == "bos" and type(value) not in (int, type(None)):
            raise TypeError(f"bos is {type(value).__name__}, not a token id")
        if field.name == "dtype" and value not in DType.__members__:
            raise TypeError(f"dtype is {value[:20]!r}, not one of {', '.join(DType.__members__)}")


def how_to_make(prefix: str) -> str:
    """What to do where a manifest is missing."""
    if all(Path(prefix + suffix).is_file() for suffix in (".bin", ".idx")):
        return f"If Megatron's own tools made {prefix}.bin and .idx, run `nha-megatron prepare --megatron {prefix} --tokenizer DIR`."
    return "Give the prefix of files made by `nha-megatron prepare`, without .bin or .idx."


def paths_of(prefix: str | Path) -> tuple[Path, Path, Path]:
    """The .bin, .idx and .json paths of a prefix. The prefix may contain dots."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx"), Path(f"{prefix}.json")


class TokenFileWriter:
    """Writes documents to PREFIX.bin, .idx and .json; a context manager.

    Everything is written aside and renamed at the end, the manifest last. If the block raises, nothing is left behind and
    files that were there before stay.
    """

    def __init__(
        self,
        prefix: str | Path,
        *,
        vocab_size: int,
        end_of_text: int,
        tokenizer: str,
        tokenizer_sha256: str,
        source: str,
        bos: int | None = None,
        max_sequence_tokens: int = MAX_SEQUENCE_TOKENS,
    ) -> None:
        self._final = paths_of(prefix)
        self._final[0].parent.mkdir(parents=True, exist_ok=True)
        self._partial = paths_of(aside(Path(prefix)))
        self._dtype = DType.optimal_dtype(vocab_size)
        self._vocab_size = vocab_size
        self._max_sequence_tokens = max_sequence_tokens
        self._about = {
            "end_of_text": end_of_text,
            "tokenizer": tokenizer,
            "tokenizer_sha256": tokenizer_sha256,
            "source": source,
            "bos": bos,
        }
        self.documents = 0
        self._tokens = 0
        self._max_token_id = -1
        self.manifest: Manifest | None = None

    def __enter__(self) -> "TokenFileWriter":
        self._builder = IndexedDatasetBuilder(str(self._partial[0]), dtype=self._dtype)
        return self

    def add_document(self, tokens: np.ndarray) -> None:
        """Append one document: a non-empty integer array [length] that ends with the end-of-text token."""
        assert tokens.ndim == 1 and tokens.size > 0, "a document has at least its end-of-text token"
        assert tokens[-1] == self._about["end_of_text"], "a document ends with the end-of-text token"
        assert self._about["bos"] in (None, tokens[0]), "a document begins with the bos token"
        low, high = int(tokens.min()), int(tokens.max())
        assert low >= 0 and high < self._vocab_size, f"token id {low if low < 0 else high} outside [0, {self._vocab_size})"
        full, rest = divmod(tokens.size, self._max_sequence_tokens)
        self._builder.add_document(tokens, [self._max_sequence_tokens] * full + ([rest] if rest else []))
        self.documents += 1
        self._tokens += tokens.size
        self._max_token_id = max(self._max_token_id, high)

    def add_documents(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents that lie one after the other in `tokens`; the same as one `add_document` each, and faster."""
        if lengths.size == 0:
            return
        ends = np.cumsum(lengths)
        if lengths.max() > self._max_sequence_tokens:
            for end, length in zip(ends.tolist(), lengths.tolist(), strict=True):
                self.add_document(tokens[end - length : end])
            return
        assert lengths.min() > 0 and ends[-1] == tokens.size, "a document has at least its end-of-text token"
        assert (tokens[ends - 1] == self._about["end_of_text"]).all(), "a document ends with the end-of-text token"
        assert self._about["bos"] is None or (tokens[ends - lengths] == self._about["bos"]).all(), "a document begins with the bos token"
        low, high = int(tokens.min()), int(tokens.max())
        assert low >= 0 and high < self._vocab_size, f"token id {low if low < 0 else high} outside [0, {self._vocab_size})"
        first = len(self._builder.sequence_lengths)
        self._builder.add_document(tokens, lengths.tolist())
        # what has been added as one document of many sequences is as many documents
        self._builder.document_indices[-1:] = range(first + 1, first + lengths.size + 1)
        self.documents += lengths.size
        self._tokens += tokens.size
        self._max_token_id = max(self._max_token_id, high)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._publish()
        finally:
            try:
                with suppress(OSError):  # the buffer of a failed write has no room on a full disk; that of a complete one is empty
                    self._builder.data_file.close()
            finally:
                for path in self._partial:
                    path.unlink(missing_ok=True)

    def complete(self) -> None:
        """Writes everything that remains to be written, still aside. What can fail has been done then."""
        if self.manifest is not None:
            return
        bin_partial, idx_partial, json_partial = self._partial
        self._builder.finalize(str(idx_partial))
        self.manifest = Manifest(
            format_version=FORMAT_VERSION,
            documents=self.documents,
            tokens=self._tokens,
            dtype=np.dtype(self._dtype).name,
            max_token_id=self._max_token_id,
            bin=FileRecord.of(bin_partial),
            idx=FileRecord.of(idx_partial),
            **self._about,  # type: ignore[arg-type]
        )
        json_partial.write_text(self.manifest.to_json())
        for path in self._partial:
            sync(path)

    def _publish(self) -> None:
        self.complete()
        # An old manifest must never stand beside new data: remove it first, put the new one last.
        self._final[2].unlink(missing_ok=True)
        for partial, final in zip(self._partial, self._final, strict=True):
            os.replace(partial, final)
        sync(self._final[0].parent)


def remove_token_files(prefix: str | Path) -> None:
    """Removes a set of token files, its manifest first."""
    for path in reversed(paths_of(prefix)):
        path.unlink(missing_ok=True)


def _corrupt_index(path: Path, reason: str) -> str:
    return f"token files: the index {path} is corrupt ({reason}). Copy it again or prepare the data again."


def _check_index_header(path: Path, manifest: Manifest) -> None:
    """Check what Megatron's reader trusts: the magic word, the type, and that the counts fill the file exactly."""
    header = struct.Struct("<9sQBQQ")
    with path.open("rb") as stream:
        data = stream.read(header.size)
    if len(data) < header.size:
        raise ConfigError(_corrupt_index(path, "too short"))
    magic, version, dtype_code, sequences, boundaries = header.unpack(data)
    if (magic, version) != (b"MMIDIDX\x00\x00", 1):
        raise ConfigError(_corrupt_index(path, "not an index of version 1"))
    if dtype_code != DType[manifest.dtype].value:
        raise ConfigError(_corrupt_index(path, f"its type is not {manifest.dtype}, which its manifest names"))
    # 4 bytes of length and 8 of offset per sequence, 8 per document boundary
    if header.size + 12 * sequences + 8 * boundaries != manifest.idx.bytes or boundaries != manifest.documents + 1:
        raise ConfigError(_corrupt_index(path, "its counts do not fit its size or its manifest"))


class TokenFile:
    """Read access to one set of token files, memory-mapped.

    Opening checks the manifest and the file sizes (no data is read); `verify_checksums` reads everything.

    Raises ConfigError if a file is missing or truncated, or the manifest is corrupt.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        self._paths = paths_of(prefix)
        self.manifest = Manifest.read(self._paths[2])
        for path, record in ((self._paths[0], self.manifest.bin), (self._paths[1], self.manifest.idx)):
            if not path.exists():
                raise ConfigError(f"token files {self.prefix!r}: {path} is missing. Copy it back or prepare the data again.")
            if path.stat().st_size != record.bytes:
                raise ConfigError(
                    f"token files {self.prefix!r}: {path} has {path.stat().st_size} bytes, its manifest says {record.bytes}. "
                    "The file is truncated or was replaced: copy it again or prepare the data again."
                )
        _check_index_header(self._paths[1], self.manifest)
        if self.manifest.tokens == 0:
            raise ConfigError(f"token files {self.prefix!r} hold no documents. Prepare them from text that is not empty.")
        try:
            self._data = IndexedDataset(self.prefix)
        except AssertionError as error:
            raise ConfigError(_corrupt_index(self._paths[1], "lengths and documents disagree")) from error
        # first sequence of each document, and the position of its first token in the .bin file, in tokens
        self._first_sequence = self._data.document_indices
        itemsize = np.dtype(self.manifest.dtype).itemsize
        lengths = self._data.sequence_lengths.astype(np.int64)
        tokens = int(lengths.sum())
        if tokens != self.manifest.tokens or tokens * itemsize != self.manifest.bin.bytes:
            raise ConfigError(_corrupt_index(self._paths[1], f"it counts {tokens} tokens, its manifest {self.manifest.tokens}"))
        first, offsets = self._first_sequence, self._data.index.sequence_pointers
        if offsets[0] != 0 or (np.diff(offsets) != lengths[:-1] * itemsize).any():
            raise ConfigError(_corrupt_index(self._paths[1], "its sequences do not lie one after the other in the .bin file"))
        if first[0] != 0 or first[-1] != len(lengths) or (np.diff(first) < 1).any():
            raise ConfigError(_corrupt_index(self._paths[1], "its documents do not lie one after the other"))
        self.document_starts: np.ndarray = np.append(offsets // itemsize, tokens)[first]  # int64 [documents + 1]

    @property
    def num_documents(self) -> int:
        return self.manifest.documents

    @property
    def num_tokens(self) -> int:
        return self.manifest.tokens

    def read(self, document: int, start: int, length: int) -> np.ndarray:
        """`length` tokens of a document from its token `start`, in the file's dtype (a view of the mapped file)."""
        assert start >= 0 and start + length <= self.document_starts[document + 1] - self.document_starts[document]
        # The sequences of a document lie one after the other, so one read from the first crosses into the next.
        return self._data.get(int(self._first_sequence[document]), offset=start, length=length)

    def check_tokenizer(self, tokenizer_sha256: str, vocab_size: int | None = None) -> None:
        """Raises ConfigError if another tokenizer made the file, or a token id does not fit a model's vocabulary."""
        if tokenizer_sha256 != self.manifest.tokenizer_sha256:
            raise ConfigError(
                f"token files {self.prefix!r} were made with another tokenizer ({self.manifest.tokenizer}, tokenizer.json "
                f"{self.manifest.tokenizer_sha256[:12]}...) than data.tokenizer ({tokenizer_sha256[:12]}...). "
                "Point data.tokenizer to that one or prepare the data again."
            )
        if vocab_size is not None:
            self.check_vocabulary(vocab_size)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises ConfigError if the largest token id in the file is not below `vocab_size`."""
        if self.manifest.max_token_id >= vocab_size:
            raise ConfigError(
                f"token files {self.prefix!r} hold token id {self.manifest.max_token_id}, model.vocab_size is {vocab_size}. "
                f"Set model.vocab_size to at least {self.manifest.max_token_id + 1}, the size of the tokenizer's vocabulary."
            )

    def verify_checksums(self) -> None:
        """Read both files in full and compare their SHA-256 with the manifest. Raises ConfigError."""
        for path, record in ((self._paths[0], self.manifest.bin), (self._paths[1], self.manifest.idx)):
            digest = file_sha256(path)
            if digest != record.sha256:
                raise ConfigError(
                    f"token files {self.prefix!r}: the SHA-256 of {path} is {digest[:12]}..., its manifest says "
                    f"{record.sha256[:12]}... The file is corrupt: copy it again or prepare the data again."
                )
