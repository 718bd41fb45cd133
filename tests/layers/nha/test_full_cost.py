"""How full layers are computed over context ranks: chosen, explained, refused, and told by `check`."""

import pytest

from nha_megatron.config import ConfigError
from nha_megatron.estimate.report import check_report
from tests.config.cases import run

HYBRID = {"window": "16*3,full"}  # 4 query heads, 2 KV heads


def test_heads_are_exchanged_where_they_divide_and_keys_gathered_elsewhere():
    assert run(model=HYBRID, parallel={"context": 4}).exchanges["full"] == (
        "a2a",
        "the 4 query heads of a tensor rank divide over 4 context ranks",
    )
    assert run(model=HYBRID, parallel={"context": 4, "tensor": 2}).exchanges["full"] == (
        "all_gather",
        "the 2 query heads of a tensor rank do not divide over 4 context ranks",
    )
    asked = run(model=HYBRID, parallel={"context": 4, "cp_comm_type": "all_gather"}).exchanges["full"]
    assert asked[0] == "all_gather" and "asks for it" in asked[1]


@pytest.mark.parametrize("sections", [{"model": HYBRID}, {"parallel": {"context": 2, "cp_comm_type": "a2a"}}])
def test_nothing_is_exchanged_without_full_layers_or_context_ranks(sections):
    assert run(**sections).exchanges == {}


def test_a2a_is_refused_where_heads_do_not_divide():
    with pytest.raises(ConfigError) as refusal:
        run(model=HYBRID, parallel={"context": 4, "tensor": 2, "cp_comm_type": "a2a"})
    message = str(refusal.value)
    assert "model.num_heads 4 / parallel.tensor 2 = 2 is not a multiple of parallel.context 4; use all_gather or auto" in message


@pytest.mark.parametrize("window", ["16*3,full", "full"])
def test_check_tells_the_exchange_its_reason_and_its_bytes(window):
    report = check_report(run(model={"window": window}, parallel={"context": 2}))
    # 64 tokens of 16 channels in fp32, two rows: q and outputs of 4 heads, k and v of 2, half of it to the other rank.
    size = f"{2 * 64 * 12 * 16 * 4 // 2 / 1024:.4g} KiB"
    assert f"a2a, because the 4 query heads of a tensor rank divide over 2 context ranks; a rank sends {size} a layer" in report
