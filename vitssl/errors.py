"""What a user can fix. One line each: what is wrong with the values in it, what would happen, what to do."""

from collections.abc import Sequence


def first_of(names: Sequence[str], num: int = 3) -> str:
    """Names as a message tells them: the first few, and how many more there are."""
    return ", ".join(names[:num]) + (f", and {len(names) - num:,} more" if len(names) > num else "")


class UserError(Exception):
    """The base of every error that is shown as one line, without a traceback, and ends a program with exit code 2."""


class ConfigError(UserError):
    """A setting, a command line or a launch that cannot be run as written."""


class DataError(UserError):
    """Shards, folders, archives or images that are missing, damaged or not what the config says."""


class CheckpointError(UserError):
    """A checkpoint or an export that is damaged, incomplete or made for something else."""


class TrainingError(UserError):
    """A run that cannot go on: its loss is no longer a number."""
