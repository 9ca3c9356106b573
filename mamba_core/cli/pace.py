"""How fast a run of training is, and when it will end."""

import time
from collections import deque

from mamba_core.training import TrainSettings


class Pace:
    """Over the steps of the last seconds, because the first step compiles. Evaluations are timed apart."""

    SECONDS = 30.0

    def __init__(self, settings: TrainSettings, unit: str = "tokens") -> None:
        """unit: of what the speed is told, tokens or examples."""
        self._settings, self._unit = settings, unit
        self._times: deque[tuple[int, float]] = deque()
        self._paused = 0.0  # seconds in evaluations
        self._began: float | None = None
        self._before: int | None = None  # steps before the first of this process

    def evaluating(self, done: int, batches: int) -> None:
        """To be called with the batches done and all, from none to all."""
        now = time.perf_counter()
        if done == 0:
            self._began = now
        if done == batches and self._began is not None:
            self._paused, self._began = self._paused + now - self._began, None

    def after(self, steps: int) -> dict[str, float]:
        """The speed, such as tokens_per_second, and seconds_left; nothing after the first step.

        Evaluations are taken to come as often as until now.
        """
        self._before = steps - 1 if self._before is None else self._before
        now = time.perf_counter() - self._paused
        self._times.append((steps, now))
        while len(self._times) > 2 and now - self._times[1][1] > self.SECONDS:
            self._times.popleft()
        first, began = self._times[0]
        if steps == first:
            return {}
        seconds = (now - began) / (steps - first)
        count = self._settings.batch_size * (self._settings.length if self._unit == "tokens" else 1)
        with_evaluations = seconds + self._paused / (steps - self._before)
        left = with_evaluations * (self._settings.steps - steps)
        return {f"{self._unit}_per_second": count / seconds, "seconds_left": left}
