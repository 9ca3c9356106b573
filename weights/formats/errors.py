"""The one error of checkpoints, and the boundary that turns whatever a reader raises into it."""

import reprlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

MAX_MESSAGE = 2000  # bytes in UTF-8
_SHALLOW = reprlib.Repr()
_SHALLOW.maxlevel = 2
# A panic of Rust, which the packages that are written in it let through as a BaseException.
_PANICS = "pyo3_runtime"


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written: one line that names the file and the fault."""

    def __init__(self, message: str) -> None:
        # Names and fields of a hostile file may hold line ends and a terminal's commands, and be of any length.
        message = "".join(part if part.isprintable() else repr(part)[1:-1] for part in message[:MAX_MESSAGE])
        data = message.encode("utf-8", "backslashreplace")
        if len(data) > MAX_MESSAGE - 3:
            message = data[: MAX_MESSAGE - 3].decode("utf-8", "ignore") + "..."
        super().__init__(message)


@contextmanager
def boundary(where) -> Iterator[None]:
    """Whatever the block raises while it reads is a CheckpointError that names `where`, and keeps its cause.

    Only what reads input belongs in the block: no callback of a user, whose exceptions are the user's own. Warnings
    that the user has made errors pass, and so does the ImportError of a package that reading needs.

    Raises:
        CheckpointError: any Exception, and a panic of a package in Rust. Neither KeyboardInterrupt nor SystemExit.
    """
    try:
        yield
    except (CheckpointError, ImportError, Warning):
        raise
    except BaseException as fault:
        if not isinstance(fault, Exception) and type(fault).__module__ != _PANICS:
            raise
        raise CheckpointError(explained(where, fault)) from fault


def list_names(names: Iterable, limit: int = 8) -> str:
    """Names for an error message, quoted, the first few of many."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(shorten(name) for name in names[:limit]) + more


def shorten(value, limit: int = 120) -> str:
    """A value as Python writes it, cut."""
    # A pickle can nest shared tuples so that their whole text would have no end.
    text = repr(value[: limit + 1]) if isinstance(value, str) else _SHALLOW.repr(value)
    return text if len(text) <= limit else text[:limit] + "..."


def explained(where, fault: BaseException) -> str:
    """What is said of a fault, with where it is. One that no file should cause has the name of its type."""
    where = str(where)
    match fault:
        case MemoryError():
            text = "reading it needs more memory than there is"
        case RecursionError():
            text = "it is nested too deeply"
        case OSError(strerror=str(text)):
            text = text if fault.filename is None or str(fault.filename) == where else f"{text}: {fault.filename}"
        case ValueError():
            text = str(fault)
        case _:
            text = f"{type(fault).__name__}: {fault}"
    return text if text.startswith(where) or f" {where}" in text else f"{where}: {text}"
