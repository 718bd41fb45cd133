"""`nha-megatron export` and `generate`: a run's folder talks. What they refuse in detail: tests/tools/test_convert_checkpoint.py."""

from pathlib import Path

import pytest

from nha_megatron.cli.main import main
from nha_megatron.data.tokenizer import train_byte_level_bpe
from tests.distributed import RankPool
from tests.hf.hf_cases import tiny_model


def test_a_run_is_exported_and_continues_a_text(ranks: RankPool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_byte_level_bpe(["a few words of text"], 260, tmp_path / "tokenizer")
    data = {"tokenizer": str(tmp_path / "tokenizer")}
    ranks.run(1, "tests.hf.programs:save_new_run", model=tiny_model(vocab_size=260), root=tmp_path / "checkpoints", data=data)
    out = str(tmp_path / "out")
    assert main(["export", str(tmp_path), out]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/checkpoints/step_0 -> {out}\n"
    said = []
    for _ in range(2):
        assert main(["generate", out, "--prompt", "a few", "--tokens", "4", "--seed", "3"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and said[0].startswith("a few")
    assert main(["generate", str(tmp_path), "--prompt", "a few", "--tokens", "4", "--seed", "3"]) == 0  # the run itself
    taken = capsys.readouterr()
    assert taken.out == said[0] and f"{tmp_path}/checkpoints/step_0:\n" in taken.err


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((), "has no config.json: give a directory made by `nha-megatron export`"),
        (("config.json",), "has no tokenizer_config.json: export the run again with --tokenizer DIR"),
    ],
)
def test_generate_refuses_a_directory_that_cannot_talk(
    files: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in files:
        (tmp_path / name).write_text("{}")
    assert main(["generate", str(tmp_path), "--prompt", "a"]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path} {message}\n"
