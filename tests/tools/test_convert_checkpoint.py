"""`tools/convert_checkpoint.py`: from a run's folder to a Hugging Face directory, and one message for every mistake."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nha_megatron.data.tokenizer import train_byte_level_bpe
from nha_megatron.hf.export import export_to_hf
from nha_megatron.hf.families.nha.modeling_nha import NHAForCausalLM
from tests.distributed import RankPool
from tests.hf.hf_cases import random_tokens, tiny_model

TOOL = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"


@pytest.fixture(scope="module")
def run(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with one checkpoint, beside its tokenizer of 260 tokens."""
    folder = tmp_path_factory.mktemp("run")
    train_byte_level_bpe(["a few words of text"], 260, folder / "tokenizer")
    ranks.run(
        1,
        "tests.hf.programs:save_new_run",
        model=tiny_model(vocab_size=260),
        root=folder / "checkpoints",
        data={"tokenizer": str(folder / "tokenizer")},
    )
    return folder


@pytest.fixture(scope="module")
def convert():
    """`main` of the tool, in this process."""
    sys.path.insert(0, str(TOOL.parent))
    try:
        from convert_checkpoint import main
    finally:
        sys.path.remove(str(TOOL.parent))
    return main


def test_run_folder_becomes_a_model_directory(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = subprocess.run([sys.executable, TOOL, "to-hf", run, out], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "step_0" in result.stdout and str(out) in result.stdout
    config = json.loads((out / "config.json").read_text())
    assert config["eos_token_id"] == 0 and config["max_position_embeddings"] == 32 and config["dtype"] == "float32"
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 0
    assert {"tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json", "modeling_nha.py"} <= {p.name for p in out.iterdir()}


@pytest.mark.parametrize("place", [".", "checkpoints", "checkpoints/step_0"])
def test_run_checkpoints_folder_and_checkpoint_are_all_accepted(place: str, run: Path, tmp_path: Path, convert) -> None:
    assert convert(["to-hf", str(run / place), str(tmp_path / "out"), "--dtype", "bf16", "--no-tokenizer"]) == 0
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_bfloat16_is_the_rounded_float32(run: Path, tmp_path: Path) -> None:
    export_to_hf(run, tmp_path / "fp32", dtype="fp32")
    export_to_hf(run, tmp_path / "bf16", dtype="bf16")
    wide, narrow = (NHAForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).state_dict() for name in ("fp32", "bf16"))
    assert all(torch.equal(narrow[name], tensor.bfloat16().float()) for name, tensor in wide.items())
    tokens = random_tokens(1, 8)
    with torch.no_grad():
        assert NHAForCausalLM.from_pretrained(tmp_path / "bf16")(tokens).logits.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing", "out"], "missing does not exist"),
        (["empty", "out"], "is not a checkpoint"),
        (["damaged", "out"], "is damaged"),
        (["run", "full"], "full is not empty: choose another output, or pass --overwrite"),
        (["run", "full", "--overwrite"], "no config.json"),
        (["run", "out", "--tokenizer", "missing"], "there is no file"),
        (["run", "out", "--tokenizer", "large"], "has 300 tokens, the model 260"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_gets_one_message_and_writes_nothing(
    arguments: list[str], message: str, run: Path, tmp_path: Path, convert, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    if "damaged" in arguments:
        shutil.copytree(run, tmp_path / "damaged")
        next((tmp_path / "damaged").rglob("*.distcp")).write_bytes(b"short")
    if "large" in arguments:
        train_byte_level_bpe([" ".join(f"word{i}" for i in range(200))] * 2, 300, tmp_path / "large")
    names = ("missing", "empty", "damaged", "run", "full", "out", "large")
    status = convert(["to-hf", *(str(tmp_path / word) if word in names else word for word in arguments)])
    error = capsys.readouterr().err
    assert status == 2 and message in error and error.startswith("error: ") and "Traceback" not in error
    assert not (tmp_path / "out").exists() and (tmp_path / "full" / "notes.txt").is_file()
