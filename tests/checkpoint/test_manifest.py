"""A checkpoint is what its manifest says, byte for byte, or it is refused with the reason."""

import json
from pathlib import Path

import pytest

from nha_megatron.checkpoint import CheckpointError, Manifest, read_manifest, verify
from nha_megatron.checkpoint.manifest import FileEntry, write_manifest
from nha_megatron.data.checksum import file_sha256


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "a.distcp").write_bytes(b"weights")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.pt").write_bytes(b"state")
    files = {name: FileEntry((tmp_path / name).stat().st_size, file_sha256(tmp_path / name)) for name in ("a.distcp", "sub/b.pt")}
    write_manifest(tmp_path, Manifest(step=7, tokens=700, world_size=2, config={"model": {}}, versions={}, files=files))
    return tmp_path


def test_a_sound_checkpoint_gives_back_its_manifest(checkpoint: Path) -> None:
    manifest = verify(checkpoint)
    assert (manifest.step, manifest.tokens, manifest.world_size, sorted(manifest.files)) == (7, 700, 2, ["a.distcp", "sub/b.pt"])
    assert manifest == read_manifest(checkpoint)


def test_the_checksum_is_sha256_of_the_content(checkpoint: Path) -> None:
    # sha256sum of "weights"
    assert read_manifest(checkpoint).files["a.distcp"].sha256 == "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c"


def flip_a_bit(checkpoint: Path) -> None:
    (checkpoint / "a.distcp").write_bytes(b"weightr")


def truncate(checkpoint: Path) -> None:
    (checkpoint / "a.distcp").write_bytes(b"weig")


def remove_a_file(checkpoint: Path) -> None:
    (checkpoint / "sub" / "b.pt").unlink()


def remove_the_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()


def tear_the_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").write_text((checkpoint / "manifest.json").read_text()[:40])


def empty_the_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").write_text("[]")


def come_from_the_future(checkpoint: Path) -> None:
    content = json.loads((checkpoint / "manifest.json").read_text())
    (checkpoint / "manifest.json").write_text(json.dumps({**content, "format_version": 99}))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (flip_a_bit, "a.distcp has another content than was written"),
        (truncate, "a.distcp has 4 bytes instead of 7"),
        (remove_a_file, "sub/b.pt is missing"),
        (remove_the_manifest, "has no manifest.json"),
        (tear_the_manifest, "manifest.json is damaged"),
        (empty_the_manifest, "manifest.json is damaged"),
        (come_from_the_future, "version 99; this version reads"),
    ],
)
def test_damage_is_named(checkpoint: Path, damage: object, reason: str) -> None:
    damage(checkpoint)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=reason):
        verify(checkpoint)
