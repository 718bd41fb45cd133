"""The one error that a user's mistake raises."""

from collections.abc import Sequence


class ConfigError(ValueError):
    """A user's mistake: the message says what was given, what is allowed and what to change.

    The command line prints the message without a traceback and exits with 2.
    """


class OneRankError(ConfigError):
    """A mistake that one rank meets while the others go on, such as a damaged sample: that rank prints the message itself."""


def problems_message(source: str, problems: Sequence[str]) -> str:
    """One message for all problems of one source (a file name, or a description of where the values came from)."""
    assert problems
    if len(problems) == 1:
        return f"{source}: {problems[0]}"
    return f"{source}: {len(problems)} problems\n" + "\n".join(f"  {problem}" for problem in problems)


def raise_problems(problems: Sequence[str]) -> None:
    """Raise one `ConfigError` with one line a problem; nothing when the list is empty."""
    if problems:
        raise ConfigError("\n".join(problems))
