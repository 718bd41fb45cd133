"""What version 0.1.0 wrote is read as it was meant: a checkpoint, token files, a resolved configuration, an exported directory.

The files in version_0_1_0/ were made by make_version_0_1_0.py with the code of commit 87a8735, before layers had kinds.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from nha_megatron.config import load_config, with_overrides
from nha_megatron.hf.export import export_to_hf
from nha_megatron.hf.families.nha.modeling_nha import NHAForCausalLM
from nha_megatron.hf.import_ import load_hf_weights
from nha_megatron.training.metrics import read_metrics
from tests.distributed import RankPool

OLD = Path(__file__).with_name("version_0_1_0")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the files, as working directory: the configuration names them by relative paths."""
    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pretrain_in(folder: str, world_overrides: list[str]) -> str | None:
    import os

    from tests.training.small_run import pretrain_on_rank

    os.chdir(folder)
    return pretrain_on_rank(with_overrides(load_config("run/config.yaml"), world_overrides).model_dump(mode="json"))


def test_the_configuration_means_what_it_meant(folder: Path) -> None:
    config = load_config("run/config.yaml")
    assert config.model.layers == "nha" and [layer.options.window for layer in config.model.stack] == [4, None]


@pytest.mark.parametrize(("world", "overrides"), [(1, []), (2, ["parallel.context=2"])])
def test_the_checkpoint_continues(ranks: RankPool, folder: Path, world: int, overrides: list[str]) -> None:
    before = read_metrics(folder / "run" / "metrics.jsonl")
    assert ranks.run(world, pretrain_in, folder=str(folder), world_overrides=overrides) == [None] * world
    after = read_metrics(folder / "run" / "metrics.jsonl")
    assert [record["step"] for record in after] == [1, 2, 3, 4, 5, 6]
    for old, new in zip(before[3:], after[3:], strict=True):
        # Bit for bit on the machine that made the files; processors differ in the last bit of fp32 sums.
        assert new["loss"] == pytest.approx(old["loss"], rel=1e-5) and new["tokens"] == old["tokens"]
    assert after[5]["validation_loss"] == pytest.approx(before[5]["validation_loss"], rel=1e-5)
    assert after[5]["slot_share"] == pytest.approx(before[5]["slot_share"], rel=1e-4)


def test_the_exported_directory_loads_by_its_own_code_and_by_ours(folder: Path) -> None:
    expected = json.loads((folder / "expected.json").read_text())
    tokens = torch.tensor(expected["tokens"])
    sums, squares = (torch.tensor(expected[f"logits_{name}"], dtype=torch.float64) for name in ("sums", "squares"))
    theirs = AutoModelForCausalLM.from_pretrained(folder / "exported", trust_remote_code=True).eval()
    ours = NHAForCausalLM.from_pretrained(folder / "exported").eval()
    with torch.no_grad():
        for model in (theirs, ours):
            logits = model(tokens).logits.double()
            torch.testing.assert_close(logits.sum(-1), sums, rtol=0, atol=1e-5)  # fp32 logits of about 0.1, in another order of sums
            torch.testing.assert_close(logits.square().sum(-1), squares, rtol=1e-5, atol=0)


def test_weights_are_taken_from_the_exported_directory_and_an_export_of_the_old_checkpoint_is_as_good(folder: Path) -> None:
    model = load_config("run/config.yaml").model
    weights = load_hf_weights("exported", model)
    assert weights["decoder.layers.0.self_attention.linear_qkv.bias"].shape == (32,)
    export_to_hf("run", "again", with_tokenizer=False)
    again = load_hf_weights("again", model)  # of step 3, the old one is of step 6
    assert {name: tensor.shape for name, tensor in again.items()} == {name: tensor.shape for name, tensor in weights.items()}
