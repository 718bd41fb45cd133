import pytest

from nha_megatron.config import ConfigError, parse_windows
from tests.config.cases import model


@pytest.mark.parametrize(
    ("pattern", "num_layers", "windows"),
    [
        (64, 3, (64, 64, 64)),
        ("64", 3, (64, 64, 64)),
        (0, 2, (0, 0)),
        ("full", 2, (None, None)),
        ("64*7,full", 8, (64,) * 7 + (None,)),
        ("64*7,full", 16, ((64,) * 7 + (None,)) * 2),
        ("full, 32, 0*2", 4, (None, 32, 0, 0)),
        ("full*2,16", 3, (None, None, 16)),
        ("1,2,3", 6, (1, 2, 3, 1, 2, 3)),
    ],
)
def test_a_pattern_gives_every_layer_its_window(pattern, num_layers, windows):
    assert parse_windows(pattern, num_layers) == windows


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("64*7,full", "describes 8 layers, but num_layers is 12"),
        ("64*13", "describes 13 layers, but num_layers is 12"),
        ("", "cannot read ''"),
        ("64,,full", "cannot read ''"),
        ("64;full", "cannot read '64;full'"),
        ("Full", "cannot read 'Full'"),
        ("7*64*2", "cannot read"),
        ("-1", "cannot read '-1'"),
        (-1, "cannot read '-1'"),
        ("64*-2", "cannot read"),
        ("1.5", "cannot read '1.5'"),
        ("64*0,full", "count of 0"),
        ("2147483648", "too large"),
        ("9" * 5000, "too large"),
        ("64*" + "9" * 5000, "too large"),
    ],
)
def test_a_pattern_that_cannot_be_read_or_does_not_fit_is_refused(pattern, message):
    with pytest.raises(ConfigError) as refusal:
        parse_windows(pattern, 12)
    assert message in str(refusal.value)


def test_a_pattern_far_longer_than_the_depth_is_refused_without_being_written_out():
    with pytest.raises(ConfigError, match="describes 999999999 layers"):
        parse_windows("64*999999999", 12)


def test_the_model_knows_the_window_of_every_layer():
    assert [layer.options.window for layer in model(window="16*3,full").stack] == [16, 16, 16, None]
