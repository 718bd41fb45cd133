"""Files that somebody broke, or wrote to break us: one message, bounded time and memory."""

import json
import time
from pathlib import Path

import pytest

from nha_megatron.cli.main import main
from nha_megatron.config import ConfigError
from nha_megatron.config.yaml_text import read_yaml
from nha_megatron.data.token_files import TokenFile
from nha_megatron.data.tokenizer import load_tokenizer, train_byte_level_bpe
from nha_megatron.hf.families import read_directory
from tests.data.token_file_cases import write_token_file

DEEP = "[" * 200_000
LONG = "9" * 6000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (DEEP, "nested too deep"),
        ('{"format_version": 1, "tokens": ' + LONG + "}", "digits"),
        ([], "cannot be read"),
        ({"format_version": "1"}, "format version 1"),
        ({"tokens": "many"}, "tokens is not a count"),
        ({"documents": 2**80}, "documents is not a count"),
        ({"dtype": "complex"}, "dtype is 'complex'"),
        ({"tokenizer_sha256": 5}, "tokenizer_sha256 is int, not text"),
        ({"bin": {"bytes": [], "sha256": "a"}}, "bytes is not a count"),
        ({"bin": None}, "cannot be read"),
    ],
    ids=range(10),
)
def test_manifest(tmp_path: Path, changes: object, message: str) -> None:
    write_token_file(tmp_path / "c", [[1, 2]])
    path = tmp_path / "c.json"
    fields = json.loads(path.read_text())
    path.write_text(changes if isinstance(changes, str) else json.dumps({**fields, **changes} if isinstance(changes, dict) else changes))
    with pytest.raises(ConfigError, match=message):
        TokenFile(tmp_path / "c")


class TestTokenizer:
    @pytest.fixture
    def directory(self, tmp_path: Path) -> Path:
        train_byte_level_bpe(["some text"], 257, tmp_path / "t")
        return tmp_path / "t"

    @pytest.mark.parametrize("text", ["[]", '"eos_token"', "5", DEEP, LONG, '{"eos_token": ["a"]}', b"\xff"])
    def test_configuration(self, directory: Path, text: str | bytes, capsys: pytest.CaptureFixture[str]) -> None:
        (directory / "tokenizer_config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
        assert main(["prepare", "--input", str(directory / "tokenizer_config.json"), "--tokenizer", str(directory), "--output", "x"]) == 2
        error = capsys.readouterr().err
        assert "tokenizer_config.json" in error and len(error) < 500

    @pytest.mark.parametrize("token", [2**31, 3_000_000_000, 2**40])
    def test_token_ids_beyond_31_bits(self, directory: Path, token: int) -> None:
        fields = json.loads((directory / "tokenizer.json").read_text())
        fields["model"]["vocab"]["far"] = token
        (directory / "tokenizer.json").write_text(json.dumps(fields))
        with pytest.raises(ConfigError, match=r"below 2\^31|cannot be read"):
            load_tokenizer(directory)


@pytest.mark.parametrize("text", [DEEP, LONG, "[]", '{"model_type": ["nha"]}'])
def test_model_directory(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json|holds a model"):
        read_directory(tmp_path)


class TestYaml:
    def test_aliases_that_multiply(self) -> None:
        for kind, inner in (
            ("sequence", "[*a{0}, *a{0}, *a{0}, *a{0}, *a{0}, *a{0}, *a{0}, *a{0}, *a{0}]"),
            ("merge", "{{<<: [*a{0}, *a{0}, *a{0}, *a{0}, *a{0}, *a{0}]}}"),
        ):
            lines = ["a0: &a0 " + ("[x]" if kind == "sequence" else "{x: 1}")]
            lines += [f"a{i}: &a{i} {inner.format(i - 1)}" for i in range(1, 9)]
            started = time.monotonic()
            with pytest.raises(ConfigError, match=r"aliases .* stand for \de\+\d\d values"):
                read_yaml("\n".join(lines))
            assert time.monotonic() - started < 1

    def test_an_ordinary_alias(self) -> None:
        assert read_yaml("a: &a {x: 1}\nb: {<<: *a, y: *a}") == {"a": {"x": 1}, "b": {"x": 1, "y": {"x": 1}}}

    @pytest.mark.parametrize("text", [DEEP, "a: " + LONG, "x" * 2_000_000])
    def test_deep_and_long(self, text: str) -> None:
        with pytest.raises(ConfigError) as error:
            read_yaml(text)
        assert len(str(error.value)) < 300
