"""What ranks run in the tests of the kind: programs of the other tests, after the kind has been registered."""

from __future__ import annotations

from typing import Any

import tests.layers.running_mean.kind  # noqa: F401 (registers the kind in this process)
from tests.engine import programs, test_resharding
from tests.training import small_run


def train(sections: dict[str, Any], **options: Any) -> dict[str, Any]:
    return programs.train(programs.tiny_config(**sections), **options)


def train_and_save(**arguments: Any) -> Any:
    return test_resharding.train_and_save(**arguments)


def load_and_train(**arguments: Any) -> Any:
    return test_resharding.load_and_train(**arguments)


def pretrain(plain: dict[str, Any]) -> str | None:
    return small_run.pretrain_on_rank(plain)
