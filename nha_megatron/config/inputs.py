"""The files a run reads. A configuration is valid without them; a run is not."""

from importlib.util import find_spec
from pathlib import Path

from .errors import ConfigError, problems_message
from .gradient_fusion import missing_extension
from .run import RunConfig

TOKEN_FILE_SUFFIXES = (".bin", ".idx", ".json")


def missing_inputs(config: RunConfig) -> list[str]:
    """One message for each file or directory that the configuration names and that is not there."""
    missing = []
    blends = {"data.path": config.data.training_blend, "data.validation": config.data.validation_blend}
    for index, (change, stage) in enumerate(zip(config.training.stages or [], config.stages[1:], strict=True)):
        if change.path is not None:
            blends[f"training.stages.{index}.path"] = stage.config.data.training_blend
    for key, blend in blends.items():
        for entry in blend:
            absent = [suffix for suffix in TOKEN_FILE_SUFFIXES if not Path(entry.path + suffix).is_file()]
            if absent == [".json"]:
                missing.append(
                    f"{key} {entry.path!r}: no file {entry.path}.json; if Megatron's own tools made the other two, write it with "
                    f"`nha-megatron prepare --megatron {entry.path} --tokenizer DIR`"
                )
            elif absent:
                missing.append(
                    f"{key} {entry.path!r}: no file {', '.join(entry.path + suffix for suffix in absent)}; "
                    f"make it with `nha-megatron prepare`, or {'correct' if 'stages' in key else 'override'} {key}"
                )
    directories = {"data.tokenizer": config.data.tokenizer, "model.init_from": config.model.init_from}
    for key, directory in directories.items():
        if directory is not None and not Path(directory).is_dir():
            missing.append(f"{key} {directory!r}: no such directory; correct the path, or override {key}")
    if config.training.engine == "deepspeed" and find_spec("deepspeed") is None:
        missing.append(
            "training.engine deepspeed: the package deepspeed is not installed; pip install 'nha-megatron[deepspeed]', or set "
            "training.engine=megatron"
        )
    extension = missing_extension(config.training)
    return missing if extension is None else [*missing, extension]


def require_inputs(config: RunConfig) -> None:
    """Raise `ConfigError` listing everything that is missing."""
    missing = missing_inputs(config)
    if missing:
        raise ConfigError(problems_message(f"files not found (working directory {Path.cwd()})", missing))
