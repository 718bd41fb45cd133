"""Token files: what is written is read back, and damage is refused with a message."""

import json
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from nha_megatron.config import ConfigError
from nha_megatron.data.token_files import TokenFile, TokenFileWriter
from tests.data.token_file_cases import END_OF_TEXT, numbered_documents, write_token_file


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    prefix = tmp_path / "corpus.v1"  # a dot in the name is not a suffix
    write_token_file(prefix, numbered_documents([3, 1, 5]))
    return prefix


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1000, "uint16"), (65499, "uint16"), (65500, "int32"), (200_000, "int32")])
def test_documents_come_back(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    largest = vocab_size - 1  # 65498 needs all 16 bits of uint16
    write_token_file(tmp_path / "c", [[7, largest, 9], [], [largest]], vocab_size=vocab_size)
    tokens = TokenFile(tmp_path / "c")
    assert (tokens.num_documents, tokens.num_tokens, tokens.manifest.max_token_id) == (3, 7, largest)
    assert tokens.manifest.dtype == dtype and tokens.read(0, 0, 1).dtype == dtype
    assert tokens.document_starts.tolist() == [0, 4, 5, 7]
    assert tokens.read(0, 1, 3).tolist() == [largest, 9, END_OF_TEXT]
    assert tokens.read(1, 0, 1).tolist() == [END_OF_TEXT]
    assert tokens.read(2, 0, 2).tolist() == [largest, END_OF_TEXT]
    tokens.verify_checksums()


def test_megatron_reads_the_files(prefix: Path) -> None:
    data = IndexedDataset(str(prefix))
    assert [row.tolist() for row in data[0:3]] == [[1, 2, 3, 0], [4, 0], [5, 6, 7, 8, 9, 0]]


def test_document_longer_than_one_sequence_of_the_index(tmp_path: Path) -> None:
    """The index counts a sequence's tokens in 32 bits; longer documents are several sequences. Shown with a limit of 4."""
    documents = numbered_documents([9, 2, 11])
    write_token_file(tmp_path / "c", documents, max_sequence_tokens=4)
    tokens = TokenFile(tmp_path / "c")
    assert len(IndexedDataset(str(tmp_path / "c"))) == 3 + 1 + 3
    assert tokens.num_documents == 3
    for i, document in enumerate(documents):
        assert tokens.read(i, 0, len(document) + 1).tolist() == [*document, END_OF_TEXT]
    assert tokens.read(2, 3, 6).tolist() == documents[2][3:9]


def test_offsets_beyond_32_bits(tmp_path: Path) -> None:
    """A sparse file of 5 GB: the last document starts beyond byte 2^32 and is still found."""
    gap = 2_500_000_000  # tokens of two bytes
    write_token_file(tmp_path / "c", [[1, 2, 3]])
    tail = np.array([5, 6, END_OF_TEXT], dtype=np.uint16).tobytes()
    with (tmp_path / "c.bin").open("r+b") as stream:
        stream.seek(2 * gap)
        stream.write(tail)
    from megatron.core.datasets.indexed_dataset import _IndexWriter

    with _IndexWriter(str(tmp_path / "c.idx"), np.uint16) as writer:
        writer.write([gap // 2, gap // 2, 3], None, [0, 2, 3])
    manifest = json.loads((tmp_path / "c.json").read_text())
    manifest.update(documents=2, tokens=gap + 3)
    for suffix in ("bin", "idx"):
        manifest[suffix]["bytes"] = (tmp_path / f"c.{suffix}").stat().st_size
    (tmp_path / "c.json").write_text(json.dumps(manifest))
    tokens = TokenFile(tmp_path / "c")
    assert tokens.document_starts.tolist() == [0, gap, gap + 3]
    assert tokens.read(1, 0, 3).tolist() == [5, 6, END_OF_TEXT]
    assert tokens.read(0, gap - 2, 2).tolist() == [0, 0]


def test_missing_files(prefix: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no manifest nowhere\.json.*nha-megatron prepare"):
        TokenFile(tmp_path / "nowhere")
    Path(f"{prefix}.idx").unlink()
    with pytest.raises(ConfigError, match=r"corpus\.v1\.idx is missing"):
        TokenFile(prefix)


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_truncated_file(prefix: Path, suffix: str) -> None:
    path = Path(f"{prefix}.{suffix}")
    size = path.stat().st_size
    with path.open("r+b") as stream:
        stream.truncate(size - 2)
    with pytest.raises(ConfigError, match=rf"has {size - 2} bytes, its manifest says {size}.*truncated"):
        TokenFile(prefix)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format_version": 1}', '{"format_version": 1, "bin": 3, "idx": 4}'])
def test_corrupt_manifest(prefix: Path, text: str) -> None:
    Path(f"{prefix}.json").write_text(text)
    with pytest.raises(ConfigError, match=r"manifest .* cannot be read"):
        TokenFile(prefix)


def test_other_format_version(prefix: Path) -> None:
    path = Path(f"{prefix}.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 2}))
    with pytest.raises(ConfigError, match="format version 2, this program reads 1"):
        TokenFile(prefix)


@pytest.mark.parametrize(
    ("offset", "reason"),
    [
        (0, "not an index of version 1"),
        (9, "not an index of version 1"),
        (17, "its type is not uint16"),
        (18, "its counts do not fit"),
        (26, "its counts do not fit"),
        (34, "it counts .* tokens, its manifest 12"),  # a sequence length
        (46, "its sequences do not lie one after the other in the .bin file"),  # offset of the first sequence
        (54, "its sequences do not lie one after the other in the .bin file"),
        (69, "its sequences do not lie one after the other in the .bin file"),  # far beyond the file
        (70, "its documents do not lie one after the other"),  # first sequence of the first document
        (78, "its documents do not lie one after the other"),
        (93, "its documents do not lie one after the other"),  # beyond all sequences
        (-1, "lengths and documents disagree"),  # the last document boundary
    ],
)
def test_corrupt_index_of_the_right_size(prefix: Path, offset: int, reason: str) -> None:
    path = Path(f"{prefix}.idx")
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x15
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=f"index .* is corrupt .{reason}"):
        TokenFile(prefix)


def test_manifest_of_other_counts(prefix: Path) -> None:
    path = Path(f"{prefix}.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokens": 5}))
    with pytest.raises(ConfigError, match=r"it counts 12 tokens, its manifest 5"):
        TokenFile(prefix)


def test_changed_byte_is_found_by_the_checksum(prefix: Path) -> None:
    with Path(f"{prefix}.bin").open("r+b") as stream:
        stream.write(b"\x63")
    tokens = TokenFile(prefix)  # same size: opening does not read the data
    with pytest.raises(ConfigError, match=r"SHA-256 of .*corpus\.v1\.bin"):
        tokens.verify_checksums()


def test_other_tokenizer_and_small_vocabulary(prefix: Path) -> None:
    tokens = TokenFile(prefix)
    tokens.check_tokenizer("a" * 64, vocab_size=10)
    with pytest.raises(ConfigError, match="another tokenizer"):
        tokens.check_tokenizer("b" * 64)
    with pytest.raises(ConfigError, match=r"token id 9, model.vocab_size is 9. Set model.vocab_size to at least 10"):
        tokens.check_vocabulary(9)


def test_failed_writing_leaves_the_old_files(prefix: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    with (
        pytest.raises(RuntimeError),
        TokenFileWriter(prefix, vocab_size=100, end_of_text=END_OF_TEXT, tokenizer="t", tokenizer_sha256="a" * 64, source="s") as writer,
    ):
        writer.add_document(np.array([1, END_OF_TEXT]))
        raise RuntimeError("stopped half-way")
    assert sorted(tmp_path.iterdir()) == before
    tokens = TokenFile(prefix)
    tokens.verify_checksums()
    assert tokens.num_tokens == 12
    write_token_file(prefix, [[1]])
    assert TokenFile(prefix).num_tokens == 2 and sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("tokens", [[], [1, 2], [-1, END_OF_TEXT], [100, END_OF_TEXT]])
def test_writer_asserts_its_documents(tmp_path: Path, tokens: list[int]) -> None:
    """Empty, without end-of-text, negative, beyond the vocabulary."""
    with (
        pytest.raises(AssertionError),
        TokenFileWriter(
            tmp_path / "c", vocab_size=100, end_of_text=END_OF_TEXT, tokenizer="t", tokenizer_sha256="a" * 64, source="s"
        ) as writer,
    ):
        writer.add_document(np.array(tokens, dtype=np.int64))
