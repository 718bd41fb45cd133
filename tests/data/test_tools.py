"""The command-line programs: text to tokenizer to token files to samples, and their exit codes."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from nha_megatron.data.order import open_samples
from nha_megatron.data.token_files import TokenFile
from tests.data.token_file_cases import run_config

TOOLS = Path(__file__).parents[2] / "tools"


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_from_text_to_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.dumps({"text": f"Chapter {i}. " + "The wind rose and the ship turned east. " * (i % 7)}) for i in range(30)]
    (tmp_path / "corpus.jsonl").write_text("\n".join([*lines, '{"text": ""}']))
    corpus, tokenizer, prefix = (str(tmp_path / name) for name in ("corpus.jsonl", "tokenizer", "tokens/books"))
    assert tool("train_tokenizer").main(["--input", corpus, "--vocab-size", "280", "--output", tokenizer]) == 0
    common = ["--input", corpus, "--tokenizer", tokenizer, "--output", prefix, "--workers", "1"]
    assert tool("prepare_data").main([*common, "--validation-documents", "4"]) == 0
    printed = capsys.readouterr().out
    assert f"{prefix}: 26 documents" in printed and f"{prefix}_validation: 4 documents" in printed and "skipped 1 empty" in printed
    TokenFile(prefix).verify_checksums()
    data = run_config(prefix, sequence_length=32, validation=f"{prefix}_validation", tokenizer=tokenizer).data
    for split in ("train", "validation"):
        order = open_samples(data, split, vocab_size=280)  # type: ignore[arg-type]
        assert order.end_of_text == 0 and order.sample(5).shape == (33,)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("prepare_data", ["--input", "nowhere.txt", "--tokenizer", "."], "tokenizer.json"),
        ("train_tokenizer", ["--input", "nowhere.txt", "--vocab-size", "300"], "no such file"),
        ("find_corpus", [], "no English corpus found"),
    ],
)
def test_mistakes_are_one_message_and_exit_code_2(
    name: str, options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = tool(name)
    monkeypatch.chdir(tmp_path)
    if name == "find_corpus":
        monkeypatch.setattr(sys, "path", [])
    assert program.main([*options, "--output", "out"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()
