"""`nha-megatron submit`: a run as a SLURM job, or as a chain of jobs."""

import argparse

from nha_megatron.cli.command import add_config_arguments
from nha_megatron.exit_status import COMPLETE

NAME = "submit"
HELP = "submit a run to SLURM: checks it first, freezes code and configuration, says how to follow, stop and resume it"
EXAMPLE = "nha-megatron submit run.yaml --nodes 4 --time 24:00:00 --site site.yaml --dry-run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument("--nodes", type=int, required=True, metavar="N")
    parser.add_argument("--time", required=True, metavar="H:MM:SS", help="time limit of one job, as SLURM writes it")
    parser.add_argument("--site", metavar="FILE", help="site file; start from one that `nha-megatron example` lists")
    parser.add_argument("--name", help="name of the job (default: name of the run's folder)")
    parser.add_argument("--launcher", choices=("torchrun", "deepspeed"), default="torchrun")
    parser.add_argument("--chain", type=int, default=1, metavar="K", help="K jobs one after the other, where requeue is not allowed")
    parser.add_argument("--no-health", action="store_true", help="do not test the nodes before training")
    parser.add_argument("--dry-run", action="store_true", help="check everything and print the job script; write and submit nothing")


def run(arguments: argparse.Namespace) -> int:
    from nha_megatron.cluster.submit import submit

    print(submit(arguments))
    return COMPLETE
