"""What a valid configuration does that its writer may not expect."""

from .run import RunConfig


def notices(config: RunConfig) -> list[str]:
    """One line each."""
    ends = {stage.schedule_begins: stage for stage in config.stages}  # the last stage of every schedule
    found = []
    for stage in ends.values():
        optimizer, steps = stage.config.optimizer, stage.config.training.steps
        if optimizer.schedule != "constant" and optimizer.min_lr == 0 and optimizer.warmup_steps < steps:
            found.append(
                f"the learning rate of step {stage.schedule_begins + steps:,}, the last of its schedule, is 0, because min_lr is 0: that "
                "update changes nothing. Set optimizer.min_lr, such as a tenth of optimizer.lr"
            )
    return found
