"""Reading a checkpoint runs no code from it, even when its checksums have been made to fit."""

from __future__ import annotations

import dataclasses
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nha_megatron.checkpoint import CheckpointError, load_weights_full, read_manifest
from nha_megatron.checkpoint.manifest import FileEntry, write_manifest
from nha_megatron.checkpoint.safety import read_metadata, require_plain_data
from nha_megatron.data.checksum import file_sha256


class Payload:
    """Unpickling it writes a file: any code could run in its place."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (Path.write_text, (self.witness, "executed"))


def in_metadata(checkpoint: Path, payload: Payload) -> None:
    (checkpoint / ".metadata").write_bytes(pickle.dumps(payload))


def in_common_state(checkpoint: Path, payload: Payload) -> None:
    torch.save({"optimizer": payload}, checkpoint / "common.pt")


def in_an_object(checkpoint: Path, payload: Payload) -> None:
    """Adds an object to the files, as torch's planner would read it."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

    buffer = io.BytesIO()
    torch.save([payload], buffer)
    (checkpoint / "extra.distcp").write_bytes(buffer.getvalue())
    metadata = read_metadata(checkpoint)
    metadata.state_dict_metadata["extra/shard_0_1"] = BytesStorageMetadata()
    metadata.storage_data[MetadataIndex("extra/shard_0_1")] = _StorageInfo("extra.distcp", 0, len(buffer.getvalue()))
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def fit_checksums(checkpoint: Path) -> None:
    names = [str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file() and path.name != "manifest.json"]
    files = {name: FileEntry((checkpoint / name).stat().st_size, file_sha256(checkpoint / name)) for name in names}
    write_manifest(checkpoint, dataclasses.replace(read_manifest(checkpoint), files=files))


@pytest.mark.parametrize("place", [in_metadata, in_common_state, in_an_object])
def test_a_payload_is_refused_and_not_executed(folder: Path, place: Callable[[Path, Payload], None]) -> None:
    checkpoint, witness = folder / "run" / "checkpoints" / "step_4", folder / "witness"
    place(checkpoint, Payload(witness))
    fit_checksums(checkpoint)
    with pytest.raises(CheckpointError, match="unsafe"):
        load_weights_full(checkpoint)
    assert not witness.exists()


def test_the_payload_would_have_run(tmp_path: Path) -> None:
    """The test above means something: plain unpickling of the same bytes executes it."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "witness")))
    assert (tmp_path / "witness").exists()


def test_an_object_outside_the_folder_is_refused(folder: Path) -> None:
    checkpoint = folder / "run" / "checkpoints" / "step_4"
    in_an_object(checkpoint, Payload(folder / "witness"))
    (checkpoint / "extra.distcp").rename(folder / "extra.distcp")
    metadata = read_metadata(checkpoint)
    index = next(index for index in metadata.storage_data if index.fqn.startswith("extra"))
    metadata.storage_data[index] = dataclasses.replace(metadata.storage_data[index], relative_path="../../../extra.distcp")
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        require_plain_data(checkpoint)


def test_what_megatron_writes_passes(finished_run: Path) -> None:
    metadata = require_plain_data(finished_run / "run" / "checkpoints" / "step_4")
    assert "decoder.final_layernorm.weight" in metadata.state_dict_metadata
