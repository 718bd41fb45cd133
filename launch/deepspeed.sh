#!/usr/bin/env bash
# Trains with DeepSpeed's launcher: launch/deepspeed.sh [pretrain|health] CONFIG.yaml [section.key=value ...]
# The script of the package, which this calls, lists the variables it reads.
exec bash "$(dirname "${BASH_SOURCE[0]}")/../nha_megatron/cluster/scripts/deepspeed.sh" "$@"
