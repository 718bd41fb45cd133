"""Preparing token files: every kind of input, the documents that come out, and that workers change nothing."""

import gzip
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nha_megatron.config import ConfigError
from nha_megatron.data.encode import encode_documents
from nha_megatron.data.hub import read_dataset
from nha_megatron.data.prepare import ValidationSplit, prepare
from nha_megatron.data.sources import expand_inputs, read_files
from nha_megatron.data.token_files import TokenFile
from nha_megatron.data.tokenizer import END_OF_TEXT, LoadedTokenizer, load_tokenizer, tokenizer_sha256, train_byte_level_bpe

TEXTS = [f"Document {i} says that {'the sea and the land ' * (i % 5)}are {i * i} miles wide.\nSo it ends — café." for i in range(40)]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> LoadedTokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    assert train_byte_level_bpe(TEXTS, 300, directory) == 300
    return load_tokenizer(directory)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


def documents_of(prefix: Path | str) -> list[list[int]]:
    tokens = TokenFile(prefix)
    return [tokens.read(i, 0, int(length)).tolist() for i, length in enumerate(np.diff(tokens.document_starts))]


class TestTokenizer:
    def test_transformers_loads_it(self, tokenizer: LoadedTokenizer) -> None:
        from transformers import AutoTokenizer

        fast = AutoTokenizer.from_pretrained(tokenizer.path)
        text = "Zürich, 北京 \t  two  spaces\r\n\x00 end"  # bytes never seen in training come back too
        assert fast.decode(fast(text)["input_ids"]) == text
        assert (fast.eos_token, fast.eos_token_id, len(fast)) == (END_OF_TEXT, 0, 300)
        assert fast(TEXTS[3])["input_ids"] == tokenizer.tokenizer.encode(TEXTS[3]).ids

    def test_loaded(self, tokenizer: LoadedTokenizer) -> None:
        assert (tokenizer.vocab_size, tokenizer.end_of_text) == (300, 0)
        assert tokenizer.sha256 == tokenizer_sha256(tokenizer.path)
        assert load_tokenizer(tokenizer.path, end_of_text="a").end_of_text == tokenizer.tokenizer.token_to_id("a")

    def test_refusals(self, tokenizer: LoadedTokenizer, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"there is no file .*tokenizer\.json"):
            load_tokenizer(tmp_path)
        with pytest.raises(ConfigError, match=r"'<end>' is not in its vocabulary"):
            load_tokenizer(tokenizer.path, end_of_text="<end>")
        with pytest.raises(ConfigError, match="256 is too small"):
            train_byte_level_bpe(TEXTS, 256, tmp_path)
        (tmp_path / "tokenizer.json").write_text("not a tokenizer")
        with pytest.raises(ConfigError, match="cannot be read"):
            load_tokenizer(tmp_path)
        (tmp_path / "tokenizer.json").write_bytes((Path(tokenizer.path) / "tokenizer.json").read_bytes())
        with pytest.raises(ConfigError, match=r"names no eos_token.*--end-of-text"):
            load_tokenizer(tmp_path)
        (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|endoftext|>", "special": true}}')
        assert load_tokenizer(tmp_path).end_of_text == 0


class TestSources:
    def test_text_files_are_documents_paragraphs_or_lines(self, tmp_path: Path) -> None:
        (tmp_path / "a[1].txt").write_text("one\ntwo\n\nthree")  # a name that looks like a pattern
        (tmp_path / "b.md").write_text("four")
        files = expand_inputs([str(tmp_path / "b.md"), str(tmp_path / "a[1].txt")])
        assert list(read_files(files)) == ["four", "one\ntwo\n\nthree"]
        assert list(read_files(files, unit="paragraph")) == ["four", "one\ntwo", "three"]
        assert list(read_files(files, unit="line")) == ["four", "one", "two", "", "three"]

    def test_json_lines_and_parquet(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text('{"body": "x", "n": 1}\n{"body": null, "n": 2}\n{"body": "y"}\n')
        with gzip.open(tmp_path / "b.jsonl.gz", "wt") as stream:
            stream.write('{"body": "z"}\n')
        pq.write_table(pa.table({"n": [1, 2], "body": ["p", "q"]}), tmp_path / "c.parquet")
        assert list(read_files(expand_inputs([str(tmp_path)]), "body")) == ["x", "", "y", "z", "p", "q"]

    def test_inputs_keep_their_order_and_folders_are_sorted(self, tmp_path: Path) -> None:
        for name in ("z/b.txt", "z/a.txt", "z/deep/c.txt", "y.txt", "z/notes.pdf"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(name)
        files = expand_inputs([str(tmp_path / "z"), str(tmp_path / "?.txt")])
        assert [str(file.relative_to(tmp_path)) for file in files] == ["z/a.txt", "z/b.txt", "z/deep/c.txt", "y.txt"]

    def test_dataset_folder_with_splits(self, tmp_path: Path) -> None:
        for split in ("train", "test"):
            (tmp_path / f"{split}.jsonl").write_text(f'{{"text": "of {split}"}}\n')
        assert list(read_dataset(str(tmp_path), None, "test")) == ["of test"]
        with pytest.raises(ConfigError, match=r"Bad split: nope"):
            list(read_dataset(str(tmp_path), None, "nope"))

    def test_dataset_that_cannot_be_reached(self) -> None:
        with pytest.raises(ConfigError, match=r"nobody/nothing: cannot be read"):
            list(read_dataset("nobody/nothing", None, "train"))

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.jsonl", b'{"text": "x"}\n{"text":\n', r"a\.jsonl, line 2: not JSON"),
            (
                "a.jsonl",
                b'{"body": "x", "n": 1}\n',
                r"no field 'text' in 1 of 1 rows; .*a\.jsonl, line 1 has fields: body, n\. Choose another --text-field",
            ),
            ("a.jsonl", b'{"text": 5}\n', "holds int, not text"),
            ("a.txt", b"\xff\xfe\xfa", "can't decode byte"),
            ("a.parquet", b"PAR1 not really", "cannot be read"),
        ],
    )
    def test_broken_files(self, tmp_path: Path, name: str, content: bytes, message: str) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=message):
            list(read_files(expand_inputs([str(tmp_path / name)])))

    def test_inputs_that_do_not_exist(self, tmp_path: Path) -> None:
        (tmp_path / "a.pdf").write_text("x")
        for entry, message in (
            ("nowhere", "no such file"),
            ("*.txt", "no such file"),
            (".", "no file of a known kind"),
            ("a.pdf", "unknown kind"),
        ):
            with pytest.raises(ConfigError, match=message):
                expand_inputs([str(tmp_path / entry)])


class TestPrepare:
    def test_documents_end_with_end_of_text(self, tokenizer: LoadedTokenizer, tmp_path: Path) -> None:
        seen: list[tuple[int, int]] = []
        result = prepare(["alpha", "", "beta\n", " \n\t"], tmp_path / "c", tokenizer, source="test", progress=lambda *now: seen.append(now))
        expected = [[*tokenizer.tokenizer.encode(text).ids, 0] for text in ("alpha", "beta\n")]
        assert documents_of(tmp_path / "c") == expected
        assert (result.train.documents, result.empty_documents, result.validation) == (2, 2, None)
        assert seen == [(1, len(expected[0])), (2, len(expected[0]) + len(expected[1]))]
        assert result.train.tokenizer_sha256 == tokenizer.sha256 and result.train.source == "test"

    def test_text_that_spells_the_end_of_text_token_stays_text(self, tokenizer: LoadedTokenizer, tmp_path: Path) -> None:
        text = f"before {END_OF_TEXT} after"
        prepare([text], tmp_path / "c", tokenizer, source="test")
        (ids,) = documents_of(tmp_path / "c")
        assert ids.index(0) == len(ids) - 1
        assert tokenizer.tokenizer.decode(ids[:-1]) == text

    def test_workers_change_nothing(self, tokenizer: LoadedTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("nha_megatron.data.encode._TASK_CHARACTERS", 200)  # many tasks
        one, two = (list(encode_documents(TEXTS, f"{tokenizer.path}/tokenizer.json", workers)) for workers in (1, 2))
        assert [ids.tolist() for ids in one] == [ids.tolist() for ids in two]
        assert [ids.tolist() for ids in one] == [tokenizer.tokenizer.encode(text).ids for text in TEXTS]

    def test_a_worker_that_dies_is_reported(self, tmp_path: Path) -> None:
        """Shown with a tokenizer file that is gone when the workers start; a pool that loses a worker must not wait for ever."""
        with pytest.raises(ConfigError, match="a worker process died"):
            list(encode_documents(TEXTS, str(tmp_path / "gone.json"), 2))

    def test_workers_start_without_torch(self) -> None:
        program = "import sys, nha_megatron.data.encode; sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", program]).returncode == 0

    def test_validation_split_by_number(self, tokenizer: LoadedTokenizer, tmp_path: Path) -> None:
        result = prepare(["", *TEXTS], tmp_path / "c", tokenizer, source="test", validation=ValidationSplit(documents=3))
        assert result.validation is not None and (result.train.documents, result.validation.documents) == (37, 3)
        ends = [[*tokenizer.tokenizer.encode(text).ids, 0] for text in TEXTS]
        assert documents_of(f"{tmp_path}/c_validation") == ends[:3] and documents_of(tmp_path / "c") == ends[3:]

    def test_validation_split_by_fraction(self) -> None:
        split = ValidationSplit(fraction=0.1)
        drawn = [number for number in range(4000) if split.contains(number)]
        # binomial: mean 400, standard deviation 19; five of them
        assert abs(len(drawn) - 400) < 95
        assert set(drawn) < {number for number in range(4000) if ValidationSplit(fraction=0.2).contains(number)}
        assert drawn[:5] == [number for number in range(100) if split.contains(number)][:5]

    def test_nothing_is_written_when_reading_fails(self, tokenizer: LoadedTokenizer, tmp_path: Path) -> None:
        def broken() -> Iterator[str]:
            yield from TEXTS
            raise ConfigError("the input broke")

        with pytest.raises(ConfigError, match="the input broke"):
            prepare(broken(), tmp_path / "c", tokenizer, source="test", validation=ValidationSplit(documents=1))
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("texts", "split", "message"),
        [
            (["", " "], None, r"no document has any text \(2 empty ones\)"),
            (["a"], ValidationSplit(documents=1), "none of the 1 documents fell into the training split"),
            (["a"], ValidationSplit(fraction=1e-9), "none of the 1 documents fell into the validation split"),
        ],
    )
    def test_empty_splits(
        self, tokenizer: LoadedTokenizer, tmp_path: Path, texts: list[str], split: ValidationSplit | None, message: str
    ) -> None:
        with pytest.raises(ConfigError, match=message):
            prepare(texts, tmp_path / "c", tokenizer, source="test", validation=split)
        assert list(tmp_path.iterdir()) == []

    def test_splits_that_mean_nothing(self, tokenizer: LoadedTokenizer, tmp_path: Path) -> None:
        for documents, fraction in ((-1, 0.0), (0, 1.0), (0, -0.1)):
            with pytest.raises(ConfigError, match="must be at least 0"):
                ValidationSplit(documents, fraction)
        with pytest.raises(ConfigError, match="not both"):
            ValidationSplit(1, 0.5)
        with pytest.raises(ConfigError, match="at least 1 needed"):
            prepare(TEXTS, tmp_path / "c", tokenizer, source="test", workers=0)


def test_manifest_is_plain_json(tokenizer: LoadedTokenizer, tmp_path: Path) -> None:
    prepare(TEXTS, tmp_path / "c", tokenizer, source="test")
    fields = json.loads((tmp_path / "c.json").read_text())
    assert fields["documents"] == 40 and fields["end_of_text"] == 0 and len(fields["bin"]["sha256"]) == 64
