"""What the configuration can say but the system cannot do yet: refused with the reason and the alternative.

Each refusal is one function; delete it together with its test when the feature arrives.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from .consistency import Check, run_checks

if TYPE_CHECKING:
    from .run import TrainingConfig


def problems(sections: Mapping[str, Any]) -> list[str]:
    """One message for each thing asked for that is not supported, among the valid sections."""
    checks: list[Check] = [
        _deepspeed,
    ]
    return run_checks(checks, sections)


def _deepspeed(training: "TrainingConfig") -> Iterator[str]:
    if training.engine == "deepspeed":
        yield "training.engine deepspeed; not supported yet, because there is no ZeRO engine: use megatron, which shards optimizer state"
