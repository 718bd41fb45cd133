"""The exported tokenizer is that of the training: how documents began and ended comes from the token files, through the checkpoint."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nha_megatron.cli.main import main
from nha_megatron.config import ConfigError
from nha_megatron.data.identity import data_identity, trained_tokens
from nha_megatron.data.token_files import TokenFile
from nha_megatron.data.tokenizer import load_tokenizer, train_byte_level_bpe
from nha_megatron.hf.export import export_to_hf
from tests.data.token_file_cases import run_config
from tests.distributed import RankPool
from tests.hf.hf_cases import tiny_model

BOS, EOS = 260, 261  # <s> and </s>; <|endoftext|> is 0


@pytest.fixture(scope="module")
def folder(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, a tokenizer that puts <s> before and </s> after every text, as some do, and a run that has been saved without its data."""
    folder = tmp_path_factory.mktemp("bos")
    (folder / "text.txt").write_text("a few words\n\nof text\n\nfew of a")
    train_byte_level_bpe(["a few words of text"], 260, folder / "tokenizer")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", "<s> $A $B </s>", [("<s>", BOS), ("</s>", EOS)])
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    name_tokens(folder / "tokenizer", eos_token="</s>", bos_token="<s>", pad_token="[PAD]", tokenizer_class="LlamaTokenizer")
    data = {"tokenizer": str(folder / "tokenizer")}
    ranks.run(1, "tests.hf.programs:save_new_run", model=tiny_model(vocab_size=262), root=folder / "checkpoints", data=data)
    return folder


def name_tokens(directory: Path, **settings: Any) -> None:
    """Writes tokenizer_config.json, with code that must not run."""
    settings["auto_map"] = {"AutoTokenizer": ["tokenization.Tokenizer", None]}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def prepare(folder: Path, *options: str) -> str:
    prefix = str(folder / "prepared")
    inputs = ["--input", str(folder / "text.txt"), "--split-documents", "paragraph", "--tokenizer", str(folder / "tokenizer")]
    assert main(["prepare", *inputs, "--output", prefix, "--workers", "1", *options]) == 0
    return prefix


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Path:
    """A copy of the run to be spoilt."""
    shutil.copytree(folder, tmp_path / "run")
    return tmp_path / "run"


def trained_on(run: Path, prefix: str) -> None:
    """Lets the checkpoint say that these token files were its data."""
    path = run / "checkpoints" / "step_0" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["data"] = data_identity(run_config(prefix, sequence_length=4))
    path.write_text(json.dumps(manifest))


def exported(run: Path, *options: str) -> tuple[PreTrainedTokenizerFast, dict[str, Any]]:
    """The exported tokenizer, loaded without running anything, and config.json."""
    out = run / "out"
    given = [] if "--no-tokenizer" in options or "--tokenizer" in options else ["--tokenizer", str(run / "tokenizer")]
    assert main(["export", str(run), str(out), *given, *options]) == 0
    config = json.loads((out / "config.json").read_text())
    generation = json.loads((out / "generation_config.json").read_text())
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    assert [config.get(name) for name in names] == [generation.get(name) for name in names]
    tokenizer = None
    if "--no-tokenizer" not in options:
        tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=False)
        assert [config.get(name) for name in names] == [getattr(tokenizer, name) for name in names]
        assert len(tokenizer) == 262  # a pad token that is not there would get an id beyond the model's vocabulary
        assert PreTrainedTokenizerFast.from_pretrained(out)("few of").input_ids == tokenizer("few of").input_ids
    return tokenizer, config


@pytest.mark.parametrize(
    ("options", "end", "bos"),
    [((), EOS, None), (("--end-of-text", "<|endoftext|>"), 0, None), (("--bos", "add"), EOS, BOS)],
    ids=["plain", "end of text", "bos"],
)
def test_prompts_begin_and_end_as_the_documents_did(
    options: tuple[str, ...], end: int, bos: int | None, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = prepare(run, *options)
    tokens = TokenFile(prefix)
    document = tokens.read(0, 0, 2 if bos is None else 3).tolist()
    trained_on(run, prefix)
    Path(f"{prefix}.json").unlink()  # the checkpoint knows by itself
    tokenizer, config = exported(run)
    assert config["eos_token_id"] == end and config["pad_token_id"] == end and config["bos_token_id"] == bos
    assert tokenizer("a few words").input_ids[: len(document)] == document
    assert list(tokenizer(["a", "a few"], padding=True)) == ["input_ids", "attention_mask"]
    error = capsys.readouterr().err
    assert f"documents of the training begin with {'nothing (data.bos none)' if bos is None else '<s> (data.bos add)'}" in error
    assert ("the tokenizer puts <s> before every prompt" in error) == (bos is None)


def test_without_a_tokenizer_the_model_still_knows_what_ends_a_document(run: Path) -> None:
    trained_on(run, prepare(run, "--end-of-text", "<|endoftext|>"))
    assert exported(run, "--no-tokenizer")[1]["eos_token_id"] == 0


def test_a_tokenizer_without_eos(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name_tokens(run / "tokenizer")
    prefix = prepare(run, "--end-of-text", "</s>")
    assert main(["export", str(run), str(run / "out"), "--tokenizer", str(run / "tokenizer")]) == 2
    assert "say which token ends documents (--end-of-text)" in capsys.readouterr().err  # a checkpoint of an earlier version
    assert exported(run, "--end-of-text", "</s>")[1]["eos_token_id"] == EOS
    trained_on(run, prefix)
    assert exported(run, "--overwrite")[1]["eos_token_id"] == EOS


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        ("another", (), "is not the one that the model was trained with: the sha256"),
        (None, ("--end-of-text", "<|endoftext|>"), "documents of the training end with '</s>'"),
        (None, ("--end-of-text", "<end>"), "--end-of-text '<end>'"),
        (None, ("--no-tokenizer", "--end-of-text", "</s>"), "none is exported"),
        ("list", (), "holds a list, not an object"),
        ("identity", (), "what the checkpoint says of its data is damaged"),
    ],
    ids=["another tokenizer", "another end", "no such token", "no tokenizer", "a list", "identity"],
)
def test_what_contradicts_the_training_is_refused(
    spoil: str | None, options: tuple[str, ...], message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained_on(run, prepare(run))
    if spoil == "another":  # of the same size
        shutil.rmtree(run / "tokenizer")
        train_byte_level_bpe(["other words"], 262, run / "tokenizer")
    if spoil == "list":
        (run / "tokenizer" / "tokenizer_config.json").write_text("[]")
    if spoil == "identity":
        path = run / "checkpoints" / "step_0" / "manifest.json"
        manifest = json.loads(path.read_text())
        manifest["data"]["stages"][0][0]["end_of_text"] = "</s>"
        path.write_text(json.dumps(manifest))
    given = [] if "--no-tokenizer" in options else ["--tokenizer", str(run / "tokenizer")]
    assert main(["export", str(run), str(run / "out"), *given, *options]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error and not (run / "out").exists()


def test_an_identity_of_an_earlier_version_leads_to_its_token_files(run: Path) -> None:
    prefix = prepare(run)
    identity = data_identity(run_config(prefix, sequence_length=4))
    found = trained_tokens(identity)
    assert found is not None and found.end_of_text == EOS and found.bos is None
    (corpus,) = identity["stages"][0]
    earlier = {"stages": [[{key: corpus[key] for key in ("path", "bin", "idx", "share")}]]}
    assert trained_tokens(earlier) == found
    Path(f"{prefix}.json").unlink()
    assert trained_tokens(earlier) is None and trained_tokens(None) is None


def test_data_bos_must_be_what_was_prepared(run: Path) -> None:
    from nha_megatron.data import open_samples

    shutil.copytree(run, run.with_name("other"))
    added, plain = prepare(run, "--bos", "add"), prepare(run.with_name("other"))
    assert [manifest_bos(prefix) for prefix in (added, plain)] == [BOS, None]
    for prefix, bos in ((added, "add"), (plain, "none"), (added, None)):
        open_samples(run_config(prefix, sequence_length=4, bos=bos).data, "train")
    with pytest.raises(ConfigError, match=r"begin with bos token 260, data.bos is none"):
        open_samples(run_config(added, sequence_length=4, bos="none").data, "train")
    with pytest.raises(ConfigError, match=r"begin with no token of their own, those of .* with bos token 260"):
        blend = [{"path": added, "weight": 1}, {"path": plain, "weight": 1}]
        open_samples(run_config(blend, sequence_length=4).data, "train")


def test_bos_of_files_that_megatron_made(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for added in (False, True):
        prefix = prepare(run, *(("--bos", "add", "--overwrite") if added else ()))
        Path(f"{prefix}.json").unlink()
        given = ["prepare", "--megatron", prefix, "--tokenizer", str(run / "tokenizer"), "--bos", "add"]
        assert main(given) == (0 if added else 2)
        assert added or "not every document begins with token 260" in capsys.readouterr().err
    assert TokenFile(prefix).manifest.bos == BOS


def manifest_bos(prefix: str) -> int | None:
    manifest = TokenFile(prefix).manifest
    fields = {key: value for key, value in dataclasses.asdict(manifest).items() if key != "bos"}
    Path(f"{prefix}_old.json").write_text(json.dumps(fields))  # as earlier versions wrote it
    assert type(manifest).read(Path(f"{prefix}_old.json")).bos is None
    return manifest.bos


def test_bos_needs_a_token(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
    name_tokens(tmp_path / "tokenizer", eos_token="</s>")
    with pytest.raises(ConfigError, match="names no bos_token"):
        load_tokenizer(tmp_path / "tokenizer", bos="add")
    with pytest.raises(ConfigError, match="names a token of the tokenizer"):
        export_to_hf(folder, tmp_path / "out", with_tokenizer=False, end_of_text="</s>")
