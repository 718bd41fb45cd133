"""Token files against their checksums: what each depth finds, and what it reads."""

import json
from pathlib import Path

import pytest

from nha_megatron.config import ConfigError, RunConfig
from nha_megatron.data import checksum, verify
from nha_megatron.data.checksum import sampled_sha256
from nha_megatron.data.verify import verify_data
from tests.config.cases import run
from tests.data.token_file_cases import write_token_file

MIB = 2**20


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    prefix = str(tmp_path / "corpus")
    write_token_file(Path(prefix), [list(range(1, 50))] * 40)
    return prefix


def config(prefix: str, depth: str) -> RunConfig:
    return run(data={"path": prefix, "verify": depth})


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("depth", ["sizes", "sampled", "full"])
def test_sound_files_pass_and_are_described(prefix: str, depth: str) -> None:
    manifest = json.loads(Path(f"{prefix}.json").read_text())
    checked = verify_data(config(prefix, depth))
    assert [(file.path, file.sha256, file.checked) for file in checked] == [
        (f"{prefix}.bin", manifest["bin"]["sha256"], depth),
        (f"{prefix}.idx", manifest["idx"]["sha256"], depth),
    ]


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("depth", ["sampled", "full"])
def test_another_byte_is_found_and_the_file_named(prefix: str, depth: str, suffix: str) -> None:
    flip_last_byte(Path(prefix + suffix))
    with pytest.raises(ConfigError, match=rf"{suffix} has other bytes than were written \(sha256 differs\)"):
        verify_data(config(prefix, depth))
    verify_data(config(prefix, "sizes"))  # which does not look


def test_a_file_cut_short_is_found_by_its_size(prefix: str) -> None:
    path = Path(f"{prefix}.bin")
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ConfigError, match=r"corpus.bin has 3,998 bytes instead of 4,000"):
        verify_data(config(prefix, "sizes"))


def test_files_of_all_stages_and_of_validation_are_read_once(prefix: str, tmp_path: Path) -> None:
    for name in ("long", "held_out"):
        write_token_file(tmp_path / name, [list(range(1, 90))] * 40)
    stages = [{"from_tokens": 2000, "path": str(tmp_path / "long")}, {"from_tokens": 4000, "path": prefix}]
    staged = run(data={"path": prefix, "validation": str(tmp_path / "held_out")}, training={"stages": stages})
    names = [Path(file.path).name for file in verify_data(staged)]
    assert sorted(names) == sorted(f"{name}.{suffix}" for name in ("corpus", "long", "held_out") for suffix in ("bin", "idx"))
    flip_last_byte(tmp_path / "long.bin")
    with pytest.raises(ConfigError, match=r"long\.bin has other bytes"):
        verify_data(staged)


def test_files_of_an_earlier_version_are_read_in_full_where_small(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = json.loads(Path(f"{prefix}.json").read_text())
    for part in ("bin", "idx"):
        del manifest[part]["sampled_sha256"]
    Path(f"{prefix}.json").write_text(json.dumps(manifest))
    assert {file.checked for file in verify_data(config(prefix, "sampled"))} == {"full"}
    monkeypatch.setattr(verify, "SAMPLED_BYTES", 2000)  # the .bin file has 4000 bytes, the .idx file less
    assert [file.checked for file in verify_data(config(prefix, "sampled"))] == ["sizes", "full"]


def test_samples_of_a_large_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight blocks of 1 MiB of a file of 100 MiB: what is inside a block is seen, what is between is not."""
    monkeypatch.setattr(checksum, "SAMPLED_BYTES", 8 * MIB)
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(100 * MIB)  # sparse
    before = sampled_sha256(path)

    def change(offset: int) -> bool:
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(b"x")
            file.flush()
            changed = sampled_sha256(path) != before
            file.seek(offset)
            file.write(b"\0")
            file.flush()
        assert sampled_sha256(path) == before
        return changed

    step = 99 * MIB // 7
    assert all(change(offset) for offset in (0, MIB - 1, step, 3 * step + 17, 100 * MIB - 1))
    assert not change(5 * MIB)
    with path.open("r+b") as file:
        file.truncate(101 * MIB)
    assert sampled_sha256(path) != before
