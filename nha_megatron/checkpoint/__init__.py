"""Checkpoints: complete or absent, checked by checksum, readable at any parallel layout.

files.py          where things lie, publishing by rename, `latest`, retention
manifest.py       what a checkpoint holds: checksums, step, configuration; `verify`
safety.py         refuses a checkpoint whose pickled parts name anything but plain data
state.py          the run's position and random number generators
host_memory.py    copies of the state, for the writers
shards.py         a rank's share: planned by Megatron, written by a thread
write.py          one checkpoint: all ranks write, rank 0 publishes
saver.py          a run's checkpoints: in the background or not, what a failure and a slow disk do
verify_report.py  what the command `verify` prints
changes.py        what a configuration changes of the run that it continues
load.py           resume a run, or start one from weights
weights.py        all weights of a model in one process, for export
"""

from nha_megatron.checkpoint.files import SaveError, resolve
from nha_megatron.checkpoint.load import find_newest, load_checkpoint, load_weights
from nha_megatron.checkpoint.manifest import CheckpointError, Manifest, read_manifest, verify
from nha_megatron.checkpoint.saver import CheckpointSaver
from nha_megatron.checkpoint.state import Progress
from nha_megatron.checkpoint.verify_report import VerifyReport
from nha_megatron.checkpoint.weights import load_weights_full
from nha_megatron.checkpoint.write import save_checkpoint

__all__ = [
    "CheckpointError",
    "CheckpointSaver",
    "Manifest",
    "Progress",
    "SaveError",
    "VerifyReport",
    "find_newest",
    "load_checkpoint",
    "load_weights",
    "load_weights_full",
    "read_manifest",
    "resolve",
    "save_checkpoint",
    "verify",
]
