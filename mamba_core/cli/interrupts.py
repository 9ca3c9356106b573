"""Ctrl-C and its like while work goes on that must end well."""

import signal
import sys
import threading
from contextlib import suppress
from typing import Any

SIGNALLED = 128  # plus the signal's number is the exit status of what a signal ended, as shells have it
_NUMBERS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Interrupts:
    """While it is entered, it keeps the first signal, for the work to end well; the second raises KeyboardInterrupt.

    A signal that whoever started the process had it ignore, as nohup does, stays ignored.

    Attributes:
        received: the number of the last signal.
    """

    def __init__(self, told: str) -> None:
        """told: what the first signal brings about, for standard error."""
        self.received: int | None = None
        self._told = told
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            heeded = [each for each in _NUMBERS if signal.getsignal(each) is not signal.SIG_IGN]
            self._before = {each: signal.signal(each, self._receive) for each in heeded}
        return self

    def __exit__(self, *_) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)

    @property
    def status(self) -> int:
        """The exit status of what the last signal ended."""
        return SIGNALLED + (self.received or signal.SIGINT)

    def _receive(self, number: int, frame: object) -> None:
        first, self.received = self.received is None, number
        if not first:
            raise KeyboardInterrupt
        # The terminal may be gone, and what was interrupted may have been a write to it.
        with suppress(OSError, RuntimeError):
            print(f"mamba-core: {self._told}; once more ends it at once", file=sys.stderr)
