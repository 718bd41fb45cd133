"""Exported directories: what stands in them, that plain transformers loads them, and that they appear whole or not at all."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import nha_kernels
from nha_megatron.config import ConfigError, ModelConfig
from nha_megatron.data.tokenizer import train_byte_level_bpe
from nha_megatron.hf.directory import require_writable, split_into_shards, write_directory
from nha_megatron.hf.families.nha.export import code_files, to_hf_config
from nha_megatron.hf.families.nha.family import FAMILY
from nha_megatron.hf.import_ import load_hf_weights
from nha_megatron.hf.tokenizer import exported_tokenizer
from nha_megatron.hf.weight_table import to_hf
from tests.hf.hf_cases import VARIANTS, hf_model, random_tokens, random_weights, tiny_model

# A fresh interpreter in which neither of our packages can be imported.
WITHOUT_OUR_PACKAGES = """
import importlib.abc, sys
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("nha_kernels", "nha_megatron", "megatron"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
import torch
from transformers import AutoModelForCausalLM
directory, inputs, outputs = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True).eval()
tokens = torch.load(inputs, weights_only=True)
with torch.no_grad():
    logits = model(tokens).logits
generated = model.generate(tokens, max_new_tokens=6, do_sample=False)
assert not {"nha_kernels", "nha_megatron"} & set(sys.modules)
torch.save({"logits": logits, "generated": generated}, outputs)
"""


@pytest.fixture(autouse=True, scope="module")
def _offline() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


def export(directory: Path, model: ModelConfig, **options) -> None:
    config = to_hf_config(model, sequence_length=64, tokens={"eos_token_id": 0, "pad_token_id": 1})
    weights = to_hf(random_weights(model), FAMILY.entries(model), model)
    write_directory(directory, config, weights, **{"dtype": torch.float32, "code": code_files(model), **options})


@pytest.mark.parametrize("variant", VARIANTS)
def test_auto_classes_load_the_export(variant: str, tmp_path: Path) -> None:
    model = tiny_model(**VARIANTS[variant])
    export(tmp_path / "out", model)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    tokens = random_tokens(2, 12)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, hf_model(model)(tokens).logits)
    # The installed operator is used where there is one.
    assert sys.modules[type(loaded).__module__].nha_attention is nha_kernels.nha_attention
    config = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert config.model_type == "nha" and config.windows == [4, None, 0]


@pytest.mark.parametrize("name", ["sdpa", "flash_attention_2", "flex_attention", "eager"])
def test_other_implementations_of_attention_are_accepted_and_change_nothing(name: str, tmp_path: Path) -> None:
    export(tmp_path / "out", tiny_model())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True, attn_implementation=name).eval()
    tokens = random_tokens(1, 9)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, hf_model(tiny_model())(tokens).logits)
    if name == "eager":
        with pytest.raises(ValueError, match="spda"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True, attn_implementation="spda")


def test_export_works_without_our_packages(tmp_path: Path) -> None:
    model = tiny_model(empty_slots="weight", qk_norm="rms", partial_rotary_factor=0.5)
    export(tmp_path / "out", model)
    tokens = random_tokens(2, 12)
    torch.save(tokens, tmp_path / "tokens.pt")
    # -I: neither the working directory nor PYTHONPATH is searched.
    result = subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_OUR_PACKAGES, str(tmp_path / "out"), str(tmp_path / "tokens.pt"), str(tmp_path / "result.pt")],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "fresh_modules"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    alone = torch.load(tmp_path / "result.pt", weights_only=True)
    reference = hf_model(model)
    with torch.no_grad():
        torch.testing.assert_close(alone["logits"], reference(tokens).logits, atol=1e-5, rtol=1e-5)  # the same code twice
    assert torch.equal(alone["generated"], reference.generate(tokens, max_new_tokens=6, do_sample=False))


def test_save_pretrained_of_a_loaded_export_is_an_export(tmp_path: Path) -> None:
    export(tmp_path / "out", tiny_model())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True).eval()
    tokens = random_tokens(1, 9)
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, loaded.eval()(tokens).logits)


@pytest.mark.parametrize(("limit", "several"), [(10**9, False), (20_000, True)])
def test_weights_have_an_index_in_one_shard_and_in_several(limit: int, several: bool, tmp_path: Path) -> None:
    model = tiny_model()
    export(tmp_path / "out", model, max_shard_bytes=limit)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    assert files == set(index["weight_map"].values())
    assert (len(files) > 1) == several and (files == {"model.safetensors"}) != several
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "out" / file, "pt") as shard:
            assert name in shard.keys()  # noqa: SIM118 (not a dict)
            assert shard.metadata() == {"format": "pt"}
    weights = to_hf(random_weights(model), FAMILY.entries(model), model)
    assert index["weight_map"].keys() == weights.keys()
    assert index["metadata"]["total_size"] == sum(4 * weight.numel() for weight in weights.values())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert all(torch.equal(loaded.state_dict()[name], weight) for name, weight in weights.items())


def test_shards_are_cut_before_they_overflow() -> None:
    assert split_into_shards({"a": 6, "b": 4, "c": 1, "d": 30, "e": 2}, 10) == [["a", "b"], ["c"], ["d"], ["e"]]


def test_tied_weights_are_written_once(tmp_path: Path) -> None:
    export(tmp_path / "out", tiny_model(tie_embeddings=True))
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")


def test_bfloat16_export_loads_as_bfloat16(tmp_path: Path) -> None:
    export(tmp_path / "out", tiny_model(), dtype=torch.bfloat16)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert all(tensor.dtype == torch.bfloat16 for tensor in load_file(tmp_path / "out" / "model.safetensors").values())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert loaded.dtype == torch.bfloat16


def test_tokenizer_is_copied_and_nothing_else_from_its_directory(tmp_path: Path) -> None:
    train_byte_level_bpe(["a few words of text"], 260, tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "pytorch_model.bin").write_bytes(b"weights of another model")
    tokenizer = exported_tokenizer(tmp_path / "tokenizer", 300, None, None, print)
    export(tmp_path / "out", tiny_model(vocab_size=300), tokenizer=tokenizer.files)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").decode(AutoTokenizer.from_pretrained(tmp_path / "out")("few").input_ids) == "few"
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()


def test_a_directory_with_content_is_not_overwritten_by_accident(tmp_path: Path) -> None:
    export(tmp_path / "out", tiny_model())
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="--overwrite"):
        export(tmp_path / "out", tiny_model(tie_embeddings=True))
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    export(tmp_path / "out", tiny_model(tie_embeddings=True), overwrite=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != before


def test_overwrite_deletes_model_directories_only(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match=r"no config\.json"):
        require_writable(tmp_path / "home", overwrite=True)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="not a directory"):
        require_writable(tmp_path / "file", overwrite=True)


def test_a_failed_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*args: object, **kwargs: object) -> None:
        raise OSError("no space left on device")

    export(tmp_path / "kept", tiny_model())
    monkeypatch.setattr("nha_megatron.hf.directory.save_file", full_disk)
    for name in ("new", "kept"):
        with pytest.raises(ConfigError, match=r"could not be written \(no space left"):
            export(tmp_path / name, tiny_model(), overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept" / "model.safetensors").is_file()


@pytest.mark.parametrize("variant", VARIANTS)
def test_exported_weights_come_back(variant: str, tmp_path: Path) -> None:
    model = tiny_model(**VARIANTS[variant])
    export(tmp_path / "out", model, max_shard_bytes=20_000)
    weights = load_hf_weights(tmp_path / "out", model)
    assert weights.keys() == random_weights(model).keys()
    assert all(torch.equal(weights[name], weight) for name, weight in random_weights(model).items())


def test_import_allows_another_window_and_refuses_another_architecture(tmp_path: Path) -> None:
    export(tmp_path / "out", tiny_model())
    load_hf_weights(tmp_path / "out", tiny_model(window=16, empty_slots="mask", rope_theta=1e6))
    with pytest.raises(ConfigError, match=r"model.num_slots is 7, the directory has 5; model.qk_norm is 'rms', the directory has 'none'"):
        load_hf_weights(tmp_path / "out", tiny_model(num_slots=7, qk_norm="rms"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "config.json").unlink(), "there is no config.json"),
        (lambda d: (d / "config.json").write_text("{"), "cannot be read"),
        (lambda d: (d / "config.json").write_text('{"model_type": "llama"}'), "model of type 'llama'"),
        (lambda d: (d / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda d: (d / "model.safetensors").write_bytes(b"x" * 100), "cannot be read"),
        (lambda d: (d / "model.safetensors.index.json").write_text("[]"), "is damaged"),
        (lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b"}}'), "outside of the directory"),
        (lambda d: [path.unlink() for path in d.glob("model.*")], "pickled weights are not read"),
    ],
)
def test_import_refuses_what_is_not_a_sound_export(damage, message: str, tmp_path: Path) -> None:
    export(tmp_path / "out", tiny_model())
    damage(tmp_path / "out")
    with pytest.raises(ConfigError, match=message):
        load_hf_weights(tmp_path / "out", tiny_model())
