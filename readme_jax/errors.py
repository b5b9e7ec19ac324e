"""The errors a user can cause: one clear line each; the command line prints it and exits with code 2."""


class ReadMeError(Exception):
    """Bad input. The message is one line: what is wrong, where, and what to do about it."""


class ConfigError(ReadMeError):
    """A configuration value that is out of range, of the wrong type or inconsistent with another."""


class CheckpointError(ReadMeError):
    """A model or run folder that cannot be read: missing, cut short, unknown or misshapen tensors."""


class DataError(ReadMeError):
    """Text data that cannot be read: an empty domain, a line that is not JSON, too few tokens."""
