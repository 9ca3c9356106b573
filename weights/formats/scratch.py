"""Memory for what is read, used again where nobody holds what was read before: new pages cost more than the reading."""

import sys
import threading

import numpy as np

LEAST = 2**20  # bytes; malloc has less at hand
_LOOSE = 4  # how much larger than what is asked for


class Scratch:
    """Hands out arrays of bytes. kept: how many are kept for the next."""

    def __init__(self, kept: int = 2) -> None:
        self._most = kept
        self._kept: list[np.ndarray] = []
        self._lock = threading.Lock()

    def take(self, count: int) -> np.ndarray:
        """(count,) uint8, with any values. It is the caller's as long as anything holds it or a view of it."""
        if count < LEAST or not hasattr(sys, "getrefcount"):
            return np.empty(count, np.uint8)
        with self._lock:
            self._kept = [kept for kept in self._kept if count <= kept.size <= _LOOSE * count]
            for index in range(len(self._kept)):
                # One reference is the list's, one the call's: every view, of any framework, would be one more.
                if sys.getrefcount(self._kept[index]) == 2:
                    return self._kept[index][:count]
            self._kept = [*self._kept[1 - self._most :], np.empty(count, np.uint8)]
            return self._kept[-1][:]

    def clear(self) -> None:
        """Keep nothing. What somebody holds stays as it is."""
        with self._lock:
            self._kept = []
