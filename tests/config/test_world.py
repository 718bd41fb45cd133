"""Which numbers of ranks a configuration fits."""

import pytest

from nha_megatron.config import ConfigError
from tests.config.cases import run

GRID = {"parallel": {"tensor": 2, "pipeline": 2, "context": 2}}


@pytest.mark.parametrize(("world", "data"), [(8, 1), (16, 2), (32, 4)])
def test_what_the_replica_leaves_of_the_world_is_data_parallel(world, data):
    config = run(**GRID)
    assert config.check_world(world) == config.parallel.data(world) == data
    assert config.micro_batches(world) == 4 // data  # global batch 8, micro batch 2


@pytest.mark.parametrize("world", [-8, 0, 1, 4, 12])
def test_a_world_that_no_number_of_replicas_fills_is_refused(world):
    with pytest.raises(ConfigError) as refusal:
        run(**GRID).check_world(world)
    message = str(refusal.value)
    assert f"world size {world}: must be a multiple of tensor 2 x pipeline 2 x context 2 = 8" in message
    assert "start that many ranks" in message and "or change parallel.tensor" in message


def test_a_batch_that_the_world_does_not_divide_is_refused():
    with pytest.raises(
        ConfigError, match=r"global_batch_size 8 is not a multiple of training.micro_batch_size 2 x data-parallel size 3 = 6"
    ):
        run().check_world(3)
    with pytest.raises(ConfigError, match="2 x data-parallel size 8 = 16"):
        run().check_world(8)


def test_the_interleaved_schedule_needs_groups_of_micro_batches():
    # Megatron refuses a last group that is smaller than the pipeline; 4 micro batches make one group of 4 or two of 2, 1 makes none.
    interleaved = run(parallel={"pipeline": 2, "virtual_pipeline": 2})
    assert interleaved.check_world(2) == 1
    assert interleaved.check_world(4) == 2
    with pytest.raises(ConfigError, match=r"1 micro batches a step are not a multiple of parallel.pipeline 2.*remove virtual_pipeline"):
        interleaved.check_world(8)
    assert run(parallel={"pipeline": 2}).check_world(8) == 4  # 1F1B runs any number
