"""Reading documents as they are: no schema is inferred, what other fields hold changes nothing, and what is broken is named."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from nha_megatron.cli.main import main
from nha_megatron.data.sources import expand_inputs, read_files
from nha_megatron.data.token_files import TokenFile
from nha_megatron.data.tokenizer import train_byte_level_bpe


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("tokenizer")
    train_byte_level_bpe(["some text"], 257, directory)
    return str(directory)


@pytest.fixture
def prepare(tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`nha-megatron prepare` in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return lambda *options: main(["prepare", "--tokenizer", tokenizer, "--output", "out/c", "--workers", "1", *options])


def texts_of(prefix: str) -> list[str]:
    """The byte-level tokenizer of 257 tokens has a token a byte, so that the text comes back."""
    from tokenizers import Tokenizer

    files = TokenFile(prefix)
    tokenizer = Tokenizer.from_file(files.manifest.tokenizer + "/tokenizer.json")
    lengths = [int(files.document_starts[i + 1] - files.document_starts[i]) for i in range(files.num_documents)]
    return [tokenizer.decode(files.read(i, 0, length - 1).tolist()) for i, length in enumerate(lengths)]


def lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


class TestTextIsWhatStandsThere:
    def test_dates_and_numbers_in_json(self, prepare: Callable[..., int]) -> None:
        texts = ["hello", "2024-01-02T03:04:05", "1.50", "007", "true", " with spaces \r\n", "2024-01-02"]
        for number, text in enumerate(texts):
            Path(f"{number}.jsonl").write_text(lines({"text": text}))
        assert prepare("--input", "*.jsonl") == 0
        assert texts_of("out/c") == texts

    def test_line_ends_of_text_files(self, prepare: Callable[..., int]) -> None:
        Path("a.txt").write_bytes(b"one\r\ntwo\rthree\n\nfour\r\n\r\nfive")
        assert prepare("--input", "a.txt") == 0
        assert texts_of("out/c") == ["one\r\ntwo\rthree\n\nfour\r\n\r\nfive"]
        files = [Path("a.txt")]
        assert list(read_files(files, unit="line")) == ["one", "two\rthree", "", "four", "", "five"]
        assert list(read_files(files, unit="paragraph")) == ["one\r\ntwo\rthree", "four", "five"]

    def test_a_dataset_folder_of_json(self, prepare: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        Path("d").mkdir()
        Path("d/train.jsonl").write_text(lines({"text": "2024-01-02T03:04:05"}, {"text": "2024-01-02T03:04:06"}))
        assert prepare("--dataset", "d") == 0
        assert texts_of("out/c") == ["2024-01-02T03:04:05", "2024-01-02T03:04:06"]


class TestOtherFieldsChangeNothing:
    def test_between_files_and_within_one(self, prepare: Callable[..., int]) -> None:
        Path("a.jsonl").write_text(lines({"text": "a"}, {"text": "b"}))
        Path("b.jsonl").write_text(lines({"text": "c", "url": "u"}))
        late = [{"text": "x", "id": 1, "score": 1, "note": None}] * 3 + [{"text": "y", "id": "i", "score": 0.5, "note": "n", "late": {}}]
        Path("c.jsonl").write_text(lines(*late) + '\n{"text": "z", "n": ' + "9" * 6000 + "}\n")
        assert prepare("--input", ".") == 0
        assert texts_of("out/c") == ["a", "b", "c", "x", "x", "x", "y", "z"]

    def test_null_then_text(self, prepare: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
        Path("a.jsonl").write_text(lines({"text": None}, {"text": "a"}))
        assert prepare("--input", "a.jsonl") == 0
        assert "skipped 1 empty documents" in capsys.readouterr().out

    def test_one_list_and_one_object(self, tmp_path: Path) -> None:
        (tmp_path / "a.json").write_text(json.dumps([{"text": "p"}, {"text": "q", "n": 1}], indent=1))
        (tmp_path / "b.json").write_text(json.dumps({"text": "r", "n": [1, 2]}, indent=1))
        (tmp_path / "c.json").write_bytes(b"\xef\xbb\xbf" + lines({"text": "s"}).encode())
        assert list(read_files(expand_inputs([str(tmp_path)]))) == ["p", "q", "r", "s"]


COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.compress}


class TestCompressed:
    @pytest.mark.parametrize("suffix", COMPRESS)
    def test_all_kinds_and_several_frames(self, tmp_path: Path, suffix: str) -> None:
        many = [f"{'long text ' * 1000}{i}" for i in range(150)]  # 1.5 MB
        first, second = lines(*({"text": text} for text in many)).encode(), lines({"text": "end"}).encode()
        (tmp_path / f"a.jsonl{suffix}").write_bytes(COMPRESS[suffix](first) + COMPRESS[suffix](second))
        (tmp_path / f"b.txt{suffix}").write_bytes(COMPRESS[suffix](b"text"))
        assert list(read_files(expand_inputs([str(tmp_path)]))) == [*many, "end", "text"]

    @pytest.mark.parametrize("suffix", COMPRESS)
    def test_an_archive_that_was_cut_short_is_named(
        self, prepare: Callable[..., int], suffix: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        data = COMPRESS[suffix](lines(*({"text": f"{i * i}"} for i in range(1000))).encode())
        Path(f"a.jsonl{suffix}").write_bytes(data[: len(data) // 2])
        assert prepare("--input", f"a.jsonl{suffix}") == 2
        error = capsys.readouterr().err
        assert f"a.jsonl{suffix}: cannot be read: it ends too early" in error and not Path("out/c.bin").exists()


class TestBrokenInput:
    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.jsonl", b'{"text": "x"}\n{"text":\n', "a.jsonl, line 2: not JSON"),
            ("a.jsonl", b'{"text": "x"}\n["x"]\n', "a.jsonl, line 2: the row is list, not an object"),
            ("a.jsonl", b'{"text": "\xff"}\n', "a.jsonl, line 1: not JSON ('utf-8' codec"),
            ("a.jsonl", b'{"text": "\\ud83d"}\n', "a.jsonl, line 1: field 'text' holds half a pair"),
            ("a.jsonl", b'{"text": ' + b"[" * 20_000 + b"]" * 20_000 + b"}\n", "a.jsonl, line 1: not JSON (it is nested too deep)"),
            ("a.jsonl", b'{"text": 5}\n', "line 1: field 'text' holds int, not text"),
            ("a.jsonl", b"", "1 of 1 files hold nothing: a.jsonl"),
            ("a.jsonl.gz", b"", "a.jsonl.gz: cannot be read: it ends too early"),
            ("a.jsonl.gz", b"plain text", "a.jsonl.gz: cannot be read (Not a gzipped file"),
            ("a.jsonl.zst", b"plain text", "a.jsonl.zst: cannot be read"),
            ("a.json", b"[" * 200_000, "a.json: not JSON (it is nested too deep)"),
            ("a.txt", b"\xff\xfe\xfa", "a.txt: cannot be read ('utf-8' codec"),
            ("a.parquet", b"PAR1 not really", "a.parquet: cannot be read as parquet"),
            ("a.parquet", b"", "a.parquet: cannot be read as parquet"),
        ],
    )
    def test_is_one_message(
        self, prepare: Callable[..., int], name: str, content: bytes, message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        Path(name).write_bytes(content)
        assert prepare("--input", name) == 2
        assert message in capsys.readouterr().err
        assert not Path("out").exists() or not list(Path("out").iterdir())

    def test_the_fifth_of_seven(self, prepare: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
        for number in range(7):
            Path(f"{number}.jsonl").write_text(lines({"text": "x"}) + ("{" if number == 4 else ""))
        assert prepare("--input", "*.jsonl") == 2
        assert "4.jsonl, line 2: not JSON" in capsys.readouterr().err

    def test_parquet_without_rows_or_the_column(self, prepare: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
        pq.write_table(pa.table({"text": pa.array([], pa.string())}), "a.parquet")
        pq.write_table(pa.table({"text": ["x"]}), "b.parquet")
        assert prepare("--input", ".") == 0
        assert "1 of 2 files hold nothing: a.parquet" in capsys.readouterr().err
        assert prepare("--input", ".", "--text-field", "body", "--overwrite") == 2
        assert "a.parquet: there is no field 'body'. Choose --text-field from: text." in capsys.readouterr().err

    def test_the_line_in_the_second_half_of_a_large_file(
        self, prepare: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr("nha_megatron.data.parts.PART_BYTES", 500)
        Path("a.jsonl").write_text(lines(*({"text": f"number {i}"} for i in range(100))) + "{\n")
        assert prepare("--input", "a.jsonl") == 2
        assert "a.jsonl, line 101: not JSON" in capsys.readouterr().err


class TestMissing:
    ROWS = (*({"body": "x", "n": i} for i in range(1999)), {"text": "y"})

    def test_a_field_that_most_rows_lack_is_refused(self, prepare: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
        Path("a.jsonl").write_text(lines(*self.ROWS))
        assert prepare("--input", "a.jsonl") == 2
        error = capsys.readouterr().err
        assert "no field 'text' in 1,999 of 2,000 rows; a.jsonl, line 1 has fields: body, n" in error and "--allow-missing" in error
        assert not Path("out/c.json").exists()
        assert prepare("--input", "a.jsonl", "--allow-missing", "1") == 0
        assert "1 documents" in (printed := capsys.readouterr().out) and "skipped 1,999 rows without the field 'text'" in printed
        assert prepare("--input", "a.jsonl", "--allow-missing", "2", "--overwrite") == 2

    def test_a_few_are_left_out(self, prepare: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
        Path("a.jsonl").write_text(lines(*self.ROWS[:1], *([{"text": "y"}] * 200)))
        assert prepare("--input", "a.jsonl") == 0
        assert "200 documents" in (printed := capsys.readouterr().out) and "skipped 1 rows" in printed

    def test_a_tokenizer_that_stays_small_says_so(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "a.jsonl").write_text(lines({"text": "abc abc"}))
        options = ["train-tokenizer", "--input", str(tmp_path / "a.jsonl"), "--vocab-size", "5000"]
        assert main([*options, "--output", str(tmp_path / "t")]) == 0
        assert "warning: only 260 of the 5,000 tokens asked for were reached" in capsys.readouterr().err
        assert main([*options, "--output", str(tmp_path / "u"), "--text-field", "body"]) == 2
        assert "no field 'body' in 1 of 1 rows" in capsys.readouterr().err


def test_of_a_folder_only_the_data_is_taken(prepare: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    for name in (
        "d/a.txt",
        "d/.ipynb_checkpoints/a-checkpoint.txt",
        "d/README.md",
        "d/deep/LICENSE.txt",
        "d/.hidden.txt",
        "d/__MACOSX/a.txt",
    ):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(name)
    assert prepare("--input", "d") == 0
    assert texts_of("out/c") == ["d/a.txt"]
    assert "5 files of folders are left out" in capsys.readouterr().err
    assert prepare("--input", "d", "d/README.md", "d/a.txt", "--overwrite") == 0
    assert texts_of("out/c") == ["d/a.txt", "d/README.md", "d/a.txt"]
    assert "1 files are given more than once" in capsys.readouterr().err
