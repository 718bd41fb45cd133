"""Checkpoints that a disk, a copy or a hand has changed: each is one message, and never another model or another exception."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from nha_megatron.__main__ import main
from nha_megatron.checkpoint import CheckpointError
from nha_megatron.checkpoint.safety import read_metadata, require_plain_data
from tests.checkpoint.programs import find, resume
from tests.checkpoint.test_safety import fit_checksums
from tests.distributed import RankPool
from tests.training import small_run

Damage = Callable[[Path], object]
SHARD, OTHER_SHARD = "__0_0.distcp", "__1_0.distcp"


def edit_manifest(**values: Any) -> Damage:
    def damage(checkpoint: Path) -> None:
        path = checkpoint / "manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return damage


def write(name: str, content: bytes) -> Damage:
    return lambda checkpoint: (checkpoint / name).write_bytes(content)


def remove(name: str) -> Damage:
    return lambda checkpoint: (checkpoint / name).unlink()


def truncate(name: str) -> Damage:
    def damage(checkpoint: Path) -> None:
        content = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(content[: len(content) // 2])

    return damage


def flip_a_bit(name: str) -> Damage:
    def damage(checkpoint: Path) -> None:
        content = bytearray((checkpoint / name).read_bytes())
        content[len(content) // 2] ^= 1
        (checkpoint / name).write_bytes(content)

    return damage


def swap_shards(checkpoint: Path) -> None:
    (checkpoint / SHARD).rename(checkpoint / "aside")
    (checkpoint / OTHER_SHARD).rename(checkpoint / SHARD)
    (checkpoint / "aside").rename(checkpoint / OTHER_SHARD)


def take_manifest_of_step_2(checkpoint: Path) -> None:
    shutil.copy(checkpoint.with_name("step_2") / "manifest.json", checkpoint)


def edit_metadata(edit: Callable[[Any], object]) -> Damage:
    def damage(checkpoint: Path) -> None:
        metadata = read_metadata(checkpoint)
        edit(metadata)
        (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))

    return damage


def forget_a_tensor(metadata: Any) -> None:
    del metadata.state_dict_metadata["decoder.final_layernorm.weight"]


def misplace_a_tensor(metadata: Any) -> None:
    for place in metadata.storage_data.values():
        place.offset += 1


def scramble_the_places(metadata: Any) -> None:
    metadata.storage_data = dict.fromkeys(metadata.storage_data, (0, 10))


def file_entry(name: str, **values: Any) -> dict[str, Any]:
    return {name: {"bytes": 1, "sha256": "0" * 64, **values}}


DAMAGED: dict[str, tuple[Damage, str]] = {
    "shard truncated": (truncate(SHARD), f"{SHARD} has "),
    "shard missing": (remove(OTHER_SHARD), f"{OTHER_SHARD} is missing"),
    "shard empty": (write(SHARD, b""), f"{SHARD} has 0 bytes instead of"),
    "bit of a shard": (flip_a_bit(OTHER_SHARD), f"{OTHER_SHARD} has another content"),
    "shards swapped": (swap_shards, "instead of"),
    "bit of the common state": (flip_a_bit("common.pt"), "common.pt has another content"),
    "metadata missing": (remove(".metadata"), ".metadata is missing"),
    "metadata truncated": (truncate(".metadata"), ".metadata has "),
    "format file missing": (remove("metadata.json"), "metadata.json is missing"),
    "manifest missing": (remove("manifest.json"), "has no manifest.json"),
    "manifest torn": (truncate("manifest.json"), "manifest.json is damaged (JSONDecodeError"),
    "manifest empty": (write("manifest.json", b""), "manifest.json is damaged (JSONDecodeError"),
    "manifest not UTF-8": (write("manifest.json", b"\xff\xfe{}"), "manifest.json is damaged (UnicodeDecodeError"),
    "manifest a list": (write("manifest.json", b"[1, 2]"), "manifest.json is damaged (TypeError"),
    "manifest without content": (write("manifest.json", b"{}"), "manifest.json is damaged (KeyError: 'format')"),
    "manifest of another program": (edit_manifest(format="other"), "has format 'other'"),
    "manifest of the future": (edit_manifest(format_version=2), "version 2; this version reads"),
    "manifest with an unknown field": (edit_manifest(surprise=1), "manifest.json is damaged (TypeError"),
    "manifest of another step": (take_manifest_of_step_2, "says that this is step 2; rename the folder back"),
    "step not a number": (edit_manifest(step="4"), "step is '4'"),
    "step a truth value": (edit_manifest(step=True), "step is True"),
    "negative tokens": (edit_manifest(tokens=-1), "tokens is -1"),
    "no ranks": (edit_manifest(world_size=0), "world_size is 0"),
    "configuration a text": (edit_manifest(config="small"), "config is not a run's configuration"),
    "section a number": (edit_manifest(config={"model": 3}), "config is not a run's configuration"),
    "no files": (edit_manifest(files={}), "it names no files"),
    "files a list": (edit_manifest(files=[SHARD]), "manifest.json is damaged (AttributeError"),
    "file without checksum": (edit_manifest(files={SHARD: {"bytes": 1}}), "manifest.json is damaged (TypeError"),
    "brackets": (write("manifest.json", b"[" * 200_000), "manifest.json is damaged (RecursionError"),
    "a number of 6,000 digits": (write("manifest.json", b'{"step": ' + b"9" * 6000 + b"}"), "manifest.json is damaged (ValueError"),
    "a step beyond all": (edit_manifest(step=10**4000), "step is 1000"),
    "versions a list": (edit_manifest(versions=[1]), "versions is [1]"),
    "stages a number": (edit_manifest(config={"training": {"stages": 3}}), "config.training.stages is 3"),
    "guards a list": (edit_manifest(guards=[1]), "guards is [1]"),
    "losses a text": (edit_manifest(guards={"losses": "high"}), "guards.losses is 'high'"),
    "data a text": (edit_manifest(data="tokens"), "data is 'tokens'"),
    "negative size": (edit_manifest(files=file_entry(SHARD, bytes=-1)), f"the entry of {SHARD} is "),
    "size a text": (edit_manifest(files=file_entry(SHARD, bytes="1")), f"the entry of {SHARD} is "),
    "file outside": (edit_manifest(files=file_entry("../step_2/common.pt")), "../step_2/common.pt, outside the checkpoint"),
    "absolute file": (edit_manifest(files=file_entry("/etc/hostname")), "/etc/hostname, outside the checkpoint"),
}


@pytest.mark.parametrize(("damage", "reason"), DAMAGED.values(), ids=DAMAGED.keys())
def test_the_damaged_one_is_named_and_the_one_before_is_taken(
    ranks: RankPool, folder: Path, capsys: pytest.CaptureFixture[str], damage: Damage, reason: str
) -> None:
    checkpoint = folder / "run" / "checkpoints" / "step_4"
    damage(checkpoint)
    ((reports, newest),) = ranks.run(1, find, root=str(checkpoint.parent))
    assert newest == str(checkpoint.with_name("step_2")) and len(reports) == 1
    assert reports[0].startswith(f"skipped: checkpoint {checkpoint}") and reason in reports[0] and "\n" not in reports[0]

    assert main(["verify", str(folder / "run")]) == 1
    said = capsys.readouterr()
    assert [line.split()[0] for line in said.out.splitlines()] == ["sound", "damaged", "a"] and reason in said.out and said.err == ""


FORGED: dict[str, tuple[Damage, str]] = {
    "shard missing": (remove(OTHER_SHARD), "No such file or directory: "),
    "shard truncated": (truncate(SHARD), f"is said to lie beyond the end of {SHARD}"),
    "shards swapped": (swap_shards, ""),
    "shard of zeros": (lambda checkpoint: (checkpoint / SHARD).write_bytes(bytes((checkpoint / SHARD).stat().st_size)), ""),
    "foreign pickle as metadata": (write(".metadata", pickle.dumps(pickle.Unpickler)), "it names _pickle.Unpickler"),
    "harmless pickle as metadata": (write(".metadata", pickle.dumps({"a": 1})), ".metadata holds a dict, not checkpoint metadata"),
    "metadata truncated": (truncate(".metadata"), ".metadata is damaged or unsafe"),
    "metadata of nonsense": (edit_metadata(scramble_the_places), ".metadata is damaged or unsafe"),
    "tensor forgotten": (edit_metadata(forget_a_tensor), "does not fit this model: "),
    "tensors misplaced": (edit_metadata(misplace_a_tensor), ""),
    "foreign pickle as common state": (
        lambda checkpoint: torch.save({"a": Fraction(1, 2)}, checkpoint / "common.pt"),
        "common.pt is damaged or unsafe",
    ),
    "common state empty": (lambda checkpoint: torch.save({}, checkpoint / "common.pt"), "does not fit this model: "),
    "common state missing": (remove("common.pt"), "common.pt is missing"),
    "format file missing": (remove("metadata.json"), "does not fit this model: "),
    "format file torn": (write("metadata.json", b"{"), ""),
    "other model under this configuration": (lambda checkpoint: None, "does not fit this model: "),
    "data not said": (edit_manifest(data={"stages": 3}), "does not say what was read"),
}


@pytest.mark.parametrize(("damage", "reason"), FORGED.values(), ids=FORGED.keys())
def test_when_the_checksums_fit_loading_finds_it(ranks: RankPool, folder: Path, damage: Damage, reason: str) -> None:
    """Whoever can change a file can change its checksum."""
    checkpoint = folder / "run" / "checkpoints" / "step_4"
    plain = small_run.settings(folder)
    if damage is FORGED["other model under this configuration"][0]:
        plain["model"]["num_slots"] = 8
        config = json.loads((checkpoint / "manifest.json").read_text())["config"]
        config["model"]["num_slots"] = 8
        edit_manifest(config=config)(checkpoint)
    damage(checkpoint)
    fit_checksums(checkpoint)
    ((reports, message),) = ranks.run(1, resume, plain=plain)
    try:
        require_plain_data(checkpoint)
    except CheckpointError as error:  # as `verify` says it, before a model is built: the one before is taken
        assert reason in str(error) and "\n" not in str(error)
        assert (reports, message) == ([f"skipped: {error}"], 2)
        return
    assert reports == [] and isinstance(message, str), message
    assert message.startswith(f"checkpoint {checkpoint}") and reason in message and "\n" not in message and len(message) < 700, message
