"""The memory estimate against what training runs needed: every row with a peak in docs/results."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from nha_megatron.config import parse_config
from nha_megatron.estimate.memory import estimate_memory

RESULTS = Path(__file__).parents[2] / "docs" / "results"

# Not counted are exchange buffers, workspaces of matrix products and a few vectors a token: up to 1 GiB of 23 to 72.
TOLERANCE = 0.03


def rows() -> dict[str, tuple[dict[str, Any], int, int, int, str, bool, float]]:
    """Name -> (model, ranks, context ranks, tokens of a sequence, recomputation, packed, bytes)."""
    found = {}
    for path in sorted(RESULTS.glob("training_*.json")):
        content = json.loads(path.read_text())
        model = {name: value for name, value in content["model"].items() if name != "parameters"}
        for row in content["rows"]:
            if row.get("peak_bytes"):
                packed = content["document_tokens"] is not None
                values = (content["environment"]["ranks"], row["context"], row["tokens"], row["recompute"], packed, row["peak_bytes"])
                found["-".join(map(str, (path.stem, *values[1:4])))] = (model, *values)
    text = (RESULTS / "training_two_nvidia_h200.txt").read_text()
    for match in re.finditer(r"context=(\d), tokens=(\d+), recompute='(\w+)'\): .* ([\d.]+) GB", text):
        context, tokens, recompute, size = match.groups()
        found[f"two-{context}-{tokens}-{recompute}"] = (model, 2, int(context), int(tokens), recompute, False, float(size) * 1e9)
    return found


ROWS = rows()


@pytest.mark.parametrize("name", ROWS)
def test_the_estimate_is_what_was_measured(name: str) -> None:
    model, ranks, context, tokens, recompute, packed, measured = ROWS[name]
    config = parse_config(
        {
            "model": model,
            "parallel": {"context": context},
            "data": {"path": "x", "sequence_length": tokens, "packing": "concat" if packed else "none"},
            "training": {
                "steps": 3,
                "micro_batch_size": 1,
                "global_batch_size": ranks // context,
                "precision": "bf16",
                "recompute": recompute,
            },
            "optimizer": {"lr": 1e-4},
            "logging": {"directory": "x"},
        }
    )
    assert estimate_memory(config, ranks).total == pytest.approx(measured, rel=TOLERANCE)


def test_there_are_rows() -> None:
    assert len(ROWS) >= 20
