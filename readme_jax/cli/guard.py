"""From exceptions to exit codes: what a user can cause is one line on stderr and exit code 2."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import typer

from readme_jax.errors import ReadMeError

BAD_INPUT = 2
INTERRUPTED = 130
# typer carries its own copy of click from 0.25 on: reach its base class without naming either.
_USAGE = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


def guarded(run: Callable[[], Any]) -> int:
    """Run a command and return its exit code. Errors that are not the user's keep their traceback."""
    try:
        code = run()
    except typer.Exit as e:
        return e.exit_code
    except SystemExit as e:  # tuning's Interrupted says what was saved
        return _say(str(e), e.code) if isinstance(e.code, int) and str(e) != str(e.code) else _code(e.code)
    except (KeyboardInterrupt, typer.Abort):
        return _say("interrupted", INTERRUPTED)
    except BrokenPipeError:  # the reader of a pipe has gone; keep the interpreter from flushing into it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as e:
        message = explain(e)
        if message is None:
            raise
        return _say(message, BAD_INPUT)
    return _code(code)


def _code(code: object) -> int:
    return code if isinstance(code, int) else 0


def explain(error: BaseException) -> str | None:
    """One line about an error that the user can mend, or None for one that only we can."""
    if isinstance(error, ReadMeError):
        return _one_line(error)
    if isinstance(error, _USAGE):
        return _one_line(getattr(error, "format_message", error.__str__)())
    for cause in _chain(error):
        if isinstance(cause, ReadMeError):
            return _one_line(cause)
        if isinstance(cause, OSError) and cause.errno in (*_FULL, *_FORBIDDEN):
            where = f" {cause.filename}" if cause.filename else ""
            if cause.errno in _FULL:
                return f"disk full while writing{where or ' output'}: nothing was left half-written; free some space"
            return f"cannot write{where}: {cause.strerror}"
        if "No space left on device" in str(cause):  # tensorstore's own exceptions carry no errno
            return "disk full while writing a checkpoint: the last complete one is intact; free some space"
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _one_line(error: object) -> str:
    return " ".join(str(error).split())


def _say(message: str, code: int) -> int:
    print(message if code != BAD_INPUT else f"error: {message}", file=sys.stderr)
    return code
