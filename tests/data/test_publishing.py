"""What preparation leaves on the disk: everything or nothing, nothing stale, and what an interrupted one has done is not done again."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from nha_megatron.cli.main import main
from nha_megatron.config import ConfigError
from nha_megatron.data import encode, parts
from nha_megatron.data.token_files import TokenFile, paths_of
from nha_megatron.data.tokenizer import train_byte_level_bpe
from nha_megatron.lock import Lock


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("tokenizer")
    train_byte_level_bpe(["some text"], 257, directory)
    return str(directory)


@pytest.fixture
def prepare(tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.chdir(tmp_path)
    for number in range(6):
        Path(f"{number}.jsonl").write_text("".join(json.dumps({"text": f"file {number} line {i}"}) + "\n" for i in range(number + 3)))
    return lambda *options: main(
        ["prepare", "--input", "*.jsonl", "--tokenizer", tokenizer, "--output", "out/c", "--workers", "1", *options]
    )


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """Writing fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class TestNothingStale:
    def test_existing_output_is_refused_and_goes_whole(self, prepare: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
        assert prepare("--validation-fraction", "0.3") == 0
        first = content(Path("out"))
        assert len(first) == 6
        assert prepare() == 2
        error = capsys.readouterr().err
        assert "out/c.bin" in error and "out/c_validation.json" in error and "--overwrite" in error
        assert content(Path("out")) == first
        assert prepare("--overwrite") == 0
        assert sorted(content(Path("out"))) == ["c.bin", "c.idx", "c.json"]

    def test_a_stale_validation_set_alone_is_refused_too(self, prepare: Callable[..., int]) -> None:
        assert prepare("--validation-documents", "3") == 0
        for path in paths_of("out/c"):
            path.unlink()
        assert prepare() == 2

    def test_a_tokenizer_is_replaced_whole_or_not(self, prepare: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
        options = ["train-tokenizer", "--input", "0.jsonl", "--vocab-size", "270", "--output", "t"]
        assert main(options) == 0
        Path("t/added_tokens.json").write_text("{}")
        before = content(Path("t"))
        assert main(options) == 2 and "--overwrite" in capsys.readouterr().err
        assert content(Path("t")) == before
        assert main([*options, "--overwrite"]) == 0
        assert "added_tokens.json" not in content(Path("t"))
        Path("other").mkdir()
        Path("other/mine.txt").write_text("mine")
        assert main([*options[:-1], "other", "--overwrite"]) == 2 and Path("other/mine.txt").exists()


class TestFullDisk:
    def test_prepare_leaves_what_was_there(self, prepare: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
        assert prepare("--validation-documents", "2") == 0
        before = content(Path("out"))
        with no_file_larger_than(300):  # the lock fits, the tokens do not
            assert prepare("--overwrite") == 2
        error = capsys.readouterr().err
        assert "token files out/c could not be written (File too large" in error and "GiB free there" in error
        assert content(Path("out")) == before

    def test_the_good_tokenizer_stays(self, prepare: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
        options = ["train-tokenizer", "--input", "0.jsonl", "--vocab-size", "270", "--output", "t"]
        assert main(options) == 0
        before = content(Path("t"))
        with no_file_larger_than(1000):
            assert main([*options, "--overwrite"]) == 2
        assert "tokenizer t could not be written" in capsys.readouterr().err
        assert content(Path("t")) == before and not [path for path in Path().iterdir() if path.name.startswith(".t.")]


class TestKilled:
    def test_leftovers_are_removed(self, prepare: Callable[..., int]) -> None:
        Path("out").mkdir()
        gone = subprocess.Popen([sys.executable, "-c", ""])
        gone.wait()
        for name in (f".c.partial-{gone.pid}.bin", f".c.partial-elsewhere-{gone.pid}.idx", f".c_validation.partial-{gone.pid}.bin"):
            Path("out", name).write_text("")
        Path("out/.cc.partial-1.bin").write_text("another prefix")
        assert prepare() == 0
        assert sorted(content(Path("out"))) == [".cc.partial-1.bin", "c.bin", "c.idx", "c.json"]

    def test_a_directory_that_died_between_two_renames_comes_back(self, prepare: Callable[..., int]) -> None:
        gone = subprocess.Popen([sys.executable, "-c", ""])
        gone.wait()
        options = ["train-tokenizer", "--input", "0.jsonl", "--vocab-size", "270", "--output", "t"]
        assert main(options) == 0
        Path("t").rename(f".t.replaced-{os.uname().nodename}-{gone.pid}")
        assert main(options) == 2  # it is there again
        assert Path("t/tokenizer.json").is_file()

    def test_workers_end_with_their_parent(self, tokenizer: str) -> None:
        program = (
            "import sys, time, multiprocessing as m\n"
            "from nha_megatron.data.encode import encode_documents\n"
            "def texts():\n"
            "    yield from ['x'] * 7000\n"
            "    print(*(p.pid for p in m.active_children()), flush=True)\n"
            "    time.sleep(60)\n"
            "if __name__ == '__main__':\n"
            "    list(encode_documents(texts(), sys.argv[1], 2))\n"
        )
        parent = subprocess.Popen([sys.executable, "-c", program, f"{tokenizer}/tokenizer.json"], stdout=subprocess.PIPE, text=True)
        assert parent.stdout is not None
        workers = [int(word) for word in parent.stdout.readline().split()]
        assert len(workers) == 2
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        parent.stdout.close()
        until = time.monotonic() + 10
        while alive := [pid for pid in workers if Path(f"/proc/{pid}").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text()]:
            assert time.monotonic() < until, f"{alive} live on"
            time.sleep(0.05)


class TestParts:
    @pytest.fixture(autouse=True)
    def small(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(parts, "PART_BYTES", 150)

    @pytest.fixture
    def expected(self, prepare: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
        with monkeypatch.context() as patch:
            patch.setattr(parts, "PART_BYTES", 2**30)
            assert prepare("--output", "whole/c", "--validation-fraction", "0.3") == 0
        return content(Path("whole"))

    def test_make_the_same_files(self, prepare: Callable[..., int], expected: dict[str, bytes]) -> None:
        assert prepare("--validation-fraction", "0.3") == 0
        assert content(Path("out")) == expected and not Path("out/c.parts").exists()

    def test_an_interrupted_preparation_goes_on(
        self, prepare: Callable[..., int], expected: dict[str, bytes], capsys: pytest.CaptureFixture[str]
    ) -> None:
        good = Path("4.jsonl").read_text()
        status = Path("4.jsonl").stat()
        Path("4.jsonl").write_text("{" + good[1:].replace(":", ";", 1))
        assert prepare("--validation-fraction", "0.3") == 2
        error = capsys.readouterr().err
        assert "4.jsonl, line 1: not JSON" in error and "parts are in out/c.parts: the same command goes on from there" in error
        Path("4.jsonl").write_text(good)
        os.utime("4.jsonl", ns=(status.st_mtime_ns + 10**9, status.st_mtime_ns + 10**9))
        assert prepare("--validation-fraction", "0.3") == 0
        assert "parts were in out/c.parts already" in capsys.readouterr().err
        assert content(Path("out")) == expected

    def test_parts_of_something_else_are_made_again(self, prepare: Callable[..., int], expected: dict[str, bytes]) -> None:
        assert prepare("--share", "0/1", "--end-of-text", "a") == 0
        assert len(list(Path("out/c.parts").glob("*.json"))) > 3
        assert prepare("--validation-fraction", "0.3") == 0
        assert content(Path("out")) == expected

    def test_several_nodes_share_one_input(self, prepare: Callable[..., int], expected: dict[str, bytes]) -> None:
        assert [prepare("--share", share) for share in ("2/3", "0/3", "1/3")] == [0, 0, 0]
        before = {path.name: path.stat().st_mtime_ns for path in Path("out/c.parts").iterdir()}
        assert len(before) > 9
        for share in ("3/3", "x", "1/"):
            assert prepare("--share", share) == 2
        assert prepare("--validation-fraction", "0.3") == 0
        assert content(Path("out")) == expected

    def test_a_share_that_runs_keeps_others_out(self, prepare: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
        with Lock("out/.c.share-0-of-2.lock", "busy"):
            assert prepare() == 2 and "another preparation makes parts" in capsys.readouterr().err
            assert prepare("--share", "1/2") == 0
        with Lock("out/.c.lock", "busy"):
            assert prepare("--share", "0/2") == 2


def test_two_preparations_onto_one_prefix(prepare: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    with Lock("out/.c.lock", "busy"):
        assert prepare() == 2
    assert f"another preparation writes out/c (process {os.getpid()} on" in capsys.readouterr().err
    assert prepare() == 0


class TestMegatronsFiles:
    @staticmethod
    def write(documents: list[list[int]], dtype: type = np.int32) -> None:
        builder = IndexedDatasetBuilder("m.bin", dtype=dtype)
        for document in documents:
            builder.add_document(np.array(document), [len(document)])
        builder.finalize("m.idx")

    @staticmethod
    def adopt(tokenizer: str, *options: str) -> int:
        return main(["prepare", "--megatron", "m", "--tokenizer", tokenizer, *options])

    def test_are_taken_as_they_are(
        self, tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        self.write([[5, 6, 0], [7, 0]])
        before = content(tmp_path)
        assert self.adopt(tokenizer) == 0
        assert "m: 2 documents, 5 tokens (int32)" in capsys.readouterr().out
        assert {**content(tmp_path), **before} == content(tmp_path)
        tokens = TokenFile("m")
        tokens.verify_checksums()
        assert tokens.read(1, 0, 2).tolist() == [7, 0] and tokens.manifest.max_token_id == 7
        assert self.adopt(tokenizer) == 2 and self.adopt(tokenizer, "--overwrite") == 0
        assert self.adopt(tokenizer, "--output", "x") == 2

    @pytest.mark.parametrize(
        ("documents", "message"),
        [
            ([[5, 6], [7, 0]], "1 of 2 documents do not end with token 0"),
            ([[300, 0]], "ids from 0 to 300"),
            ([[-1, 0]], "ids from -1 to 0"),
        ],
    )
    def test_that_do_not_fit(
        self,
        tokenizer: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        documents: list[list[int]],
        message: str,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        self.write(documents)
        assert self.adopt(tokenizer) == 2 and message in capsys.readouterr().err
        Path("m.idx").write_bytes(b"MMIDIDX\x00\x00 not an index")
        assert self.adopt(tokenizer) == 2 and not Path("m.json").exists()


class TestRegularExpressionThatBacktracks:
    """`(x+x+)+y` is given up by the regular expression library after some seconds, with a panic; `x+y` takes n^2 steps, and it goes on."""

    @staticmethod
    def tokenizer_json(tokenizer: str, folder: Path, pattern: str) -> str:
        fields = json.loads(Path(tokenizer, "tokenizer.json").read_text())
        fields["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        (folder / "tokenizer.json").write_text(json.dumps(fields))
        return str(folder / "tokenizer.json")

    @pytest.mark.parametrize("workers", [1, 2])
    def test_a_panic_is_one_message(self, tmp_path: Path, tokenizer: str, workers: int) -> None:
        with pytest.raises(ConfigError, match="texts, document 1 and what follows: the tokenizer cannot encode it"):
            list(encode.encode_documents(["x" * 40], self.tokenizer_json(tokenizer, tmp_path, "(x+x+)+y"), workers))

    @pytest.mark.parametrize("workers", [1, 2])
    def test_time_is_bounded(self, tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
        monkeypatch.setattr(encode, "_SECONDS_A_BLOCK", 0.3)
        monkeypatch.setattr(encode, "_CHARACTERS_A_SECOND", 10**9)
        length = 40_000 if workers == 1 else 400_000  # a thread cannot be ended: it must come to an end by itself
        with pytest.raises(ConfigError, match=r"texts, document 1 and what follows: .*took longer than 0 seconds"):
            list(encode.encode_documents(["x" * length], self.tokenizer_json(tokenizer, tmp_path, "x+y"), workers))
