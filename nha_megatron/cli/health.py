"""`nha-megatron health`: one rank of a test of all nodes."""

import argparse

from nha_megatron.cli.command import add_config_arguments
from nha_megatron.exit_status import COMPLETE, FAILED, announce_start, pass_on

NAME = "health"
HELP = "test devices, network, disk and clocks of all nodes; run it under the launcher of the run"
EXAMPLE = "torchrun --nproc-per-node=8 -m nha_megatron health run.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    from nha_megatron.config import load_config
    from nha_megatron.engine.environment import read_place, require_open_files
    from nha_megatron.known_warnings import silence_known_warnings

    place = read_place()
    require_open_files()
    announce_start()
    config = load_config(arguments.config, arguments.overrides)
    config.check_world(place.world_size)
    silence_known_warnings()
    from nha_megatron.cluster.health import check_health

    return pass_on(COMPLETE if check_health(config) else FAILED)
