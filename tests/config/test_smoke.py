"""A smoke configuration switches on what the large one does."""

from pathlib import Path

import pytest

from nha_megatron.config import load_config

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("small", sorted(CONFIGS.glob("*-smoke.yaml")), ids=lambda path: path.stem)
def test_what_a_smoke_configuration_switches_on(small: Path) -> None:
    large = load_config(small.with_name(small.name.replace("-smoke", "")))
    config = load_config(small)
    assert {layer.label for layer in config.model.stack} == {layer.label for layer in large.model.stack}
    for section, names in {"parallel": ("tensor", "context", "pipeline", "sequence"), "training": ("recompute", "validate_every")}.items():
        for name in names:
            one, other = (getattr(getattr(each, section), name) for each in (config, large))
            assert (one == 1) == (other == 1) and type(one) is type(other), name
    assert (config.training.precision, config.optimizer.schedule) == (large.training.precision, large.optimizer.schedule)
    assert config.parallel.tensor * config.parallel.context * config.parallel.pipeline <= 4
    assert config.data.sequence_length <= 512 and config.model.hidden_size <= 128
