"""`nha-megatron pretrain`: one rank of a run."""

import argparse

from nha_megatron.cli.command import add_config_arguments, report_error
from nha_megatron.exit_status import COMPLETE, FAILED, GIVEN_UP, STOPPED, announce_start, pass_on

NAME = "pretrain"
HELP = "train, or go on from the newest checkpoint; for several ranks run it under torchrun or another launcher"
EXAMPLE = """\
nha-megatron pretrain run.yaml training.steps=100
torchrun --nproc-per-node=8 -m nha_megatron pretrain run.yaml"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher appends it; LOCAL_RANK says the same
    add_config_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    from nha_megatron.config import load_config
    from nha_megatron.config.inputs import require_inputs
    from nha_megatron.engine.environment import read_place, require_open_files
    from nha_megatron.known_warnings import silence_known_warnings

    place = read_place()
    require_open_files()
    announce_start()
    config = load_config(arguments.config, arguments.overrides)
    # Everything that can be refused without torch is refused before it is loaded.
    config.check_world(place.world_size)
    require_inputs(config)
    silence_known_warnings()
    from nha_megatron.checkpoint import SaveError
    from nha_megatron.training.guards import TrainingError
    from nha_megatron.training.run import pretrain

    try:
        stopped_by = pretrain(config)
    except TrainingError as error:
        report_error(error)
        return pass_on(GIVEN_UP)
    except SaveError as error:
        report_error(error)
        return FAILED
    return pass_on(STOPPED if stopped_by else COMPLETE)
