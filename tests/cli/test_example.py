"""`nha-megatron example`: every ready-made file is one that the program takes."""

import json
from pathlib import Path

import pytest

from nha_megatron.cli.main import main
from nha_megatron.cluster.site import load_site
from nha_megatron.config import load_config


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["example", *arguments]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    return output.out


def test_without_a_name_it_lists_all_by_kind(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys).splitlines() == [
        "run configurations: nha-1.3b, nha-1.3b-smoke, nha-340m, nha-3b, nha-3b-hybrid, nha-3b-hybrid-smoke, nha-3b-smoke, "
        "nha-8b-128k, nha-8b-128k-smoke, quickstart",
        "DeepSpeed settings: zero1, zero2, zero3",
        "site files: apptainer, bare-metal, enroot-pyxis",
    ]


def test_every_one_is_printed_and_can_be_used(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    configurations, settings, sites = (line.partition(": ")[2].split(", ") for line in printed(capsys).splitlines())
    path = tmp_path / "file"
    for name in configurations:
        path.write_text(printed(capsys, name))
        load_config(path)
    for name in sites:
        path.write_text(printed(capsys, name))
        load_site(path)
    for name in settings:
        assert "zero_optimization" in json.loads(printed(capsys, name))


def test_a_name_that_there_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["example", "nha-340"]) == 2
    assert "error: no example 'nha-340'; did you mean 'nha-340m'?" in capsys.readouterr().err
