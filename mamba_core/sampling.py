"""How a token is chosen: the settings, their order and meaning, and the random numbers, the same on every backend.

From float32 logits (padded vocabulary entries removed) a token is chosen so:
    1. logit_bias is added to the logits of its tokens.
    2. repetition_penalty: a token that stands in the row, prompt included, has its logit divided by it if positive,
       else multiplied (Keskar et al. 2019, arXiv:1909.05858, section 4.1).
    3. frequency_penalty times how often a token has been generated in the row, and presence_penalty if it has been at
       all, are subtracted from its logit. The prompt does not count.
    4. processors, in their order: logits = processor(logits, context), a `mamba_core.backend.Context`.
    5. temperature: logits are divided by it; 0 takes the largest logit, the lower id of equals, and ends here.
    6. top_k, then top_p, then min_p: tokens ranked by probability, the lower id first among equals. top_k keeps the
       first k; top_p the shortest prefix with at least that probability; min_p those with at least that fraction of
       the largest probability. The most probable token is always kept.
    7. the token is the first, by id, at which the running sum of the kept probabilities exceeds u times their total.

A logit of -inf is never chosen. Where all of a row are -inf before step 5 there is no token: the chosen one is 0, with
the log-probability -inf. Where one of the row is NaN then, or +inf, or was so from the model, it is 0 with NaN.

u is from `Uniforms`: a seed samples the same text on each backend but where rounding moves a boundary across u.
"""

import math
import numbers
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mamba_core.backend import Context

# Of positive settings, well inside float32.
SMALLEST, LARGEST = 1e-20, 1e20


@dataclass(frozen=True)
class Sampling:
    """What a compiled step is compiled for; see this module's docstring for the order and the meaning."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    processors: tuple[Callable, ...] = ()
    top_logprobs: int = 0

    def __post_init__(self):
        _within("temperature", self.temperature, 0.0, LARGEST)
        if 0.0 < self.temperature < SMALLEST:
            raise ValueError(f"temperature is {self.temperature!r}; expected 0 for greedy, or at least {SMALLEST}")
        _within("top_p", self.top_p, 0.0, 1.0)
        _within("min_p", self.min_p, 0.0, 1.0)
        _within("repetition_penalty", self.repetition_penalty, SMALLEST, LARGEST)
        _within("presence_penalty", self.presence_penalty, -LARGEST, LARGEST)
        _within("frequency_penalty", self.frequency_penalty, -LARGEST, LARGEST)
        for name in ("top_k", "top_logprobs"):
            object.__setattr__(self, name, integer(name, getattr(self, name), least=0))
        # A compiled step is kept for each set of settings, which a list could not name.
        processors = tuple(self.processors) if isinstance(self.processors, Sequence) else (self.processors,)
        if wrong := [item for item in processors if not callable(item)]:
            raise TypeError(f"processors has {wrong[0]!r}; expected functions of logits and context")
        object.__setattr__(self, "processors", processors)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def filters(self) -> bool:
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0

    @property
    def looks_back(self) -> bool:
        """Whether a choice depends on what stands in the row."""
        penalties = self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0
        return penalties or bool(self.processors)

    def processed(self, logits: Any, context: Context) -> Any:
        """The logits after the processors.

        Raises:
            TypeError: one does not return logits of the shape and dtype that it was given.
        """
        for processor in self.processors:
            shape, dtype = logits.shape, logits.dtype
            logits = processor(logits, context)
            found = getattr(logits, "shape", None), getattr(logits, "dtype", type(logits).__name__)
            if found != (shape, dtype):
                raise TypeError(f"a processor returned {found[1]} of shape {found[0]}; expected {dtype} of {shape}")
        return logits


def first_context(
    sampling: Sampling, logit_bias: Mapping[int, float] | None, prompts, vocabulary: int
) -> Context | None:
    """The context of the first choice, of NumPy arrays; None where no choice depends on one.

    Raises:
        TypeError, ValueError: logit_bias is not from token ids of the vocabulary to numbers below +inf.
    """
    bias = _bias(logit_bias, vocabulary)
    if bias is None and not sampling.looks_back:
        return None
    seen = np.zeros((len(prompts), vocabulary), bool)
    for row, prompt in enumerate(prompts):
        seen[row, prompt] = True
    # A row that goes on from a state may have no prompt of its own.
    last = np.array([prompt[-1] if len(prompt) else 0 for prompt in prompts], np.int32)
    return Context(last, seen, np.zeros(seen.shape, np.int32), np.zeros((), np.int32), bias)


def _bias(logit_bias, vocabulary: int) -> np.ndarray | None:
    if not logit_bias:
        return None
    if not isinstance(logit_bias, Mapping):
        raise TypeError(f"logit_bias is {type(logit_bias).__name__}; expected a mapping from token ids to numbers")
    bias = np.zeros(vocabulary, np.float32)
    for token, value in logit_bias.items():
        if not 0 <= integer("a token of logit_bias", token) < vocabulary:
            raise ValueError(f"logit_bias holds token {token}; vocab_size is {vocabulary}")
        if value != -math.inf:
            _within(f"logit_bias of token {token}", value, -LARGEST, LARGEST)
        bias[token] = value
    return bias


class Uniforms:
    """Random numbers in [0, 1) for a batch: one a row and step, which depends on the row's seed and the step alone.

    The number is Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") of the key seed and
    the counter (step, row, sample, 0), the upper 24 bits of its first word as a fraction. With one seed for all, row is
    the prompt's index; with a seed for each it is 0, so that a prompt alone and its seed give the same text. sample is
    the index among a prompt's continuations.

    Raises:
        TypeError, ValueError: seed is not an integer from 0 to 2^64 - 1, or a sequence of as many as there are prompts.
    """

    def __init__(self, seed: int | Sequence[int], prompts: int, samples: int = 1):
        each = isinstance(seed, (Sequence, np.ndarray)) and not isinstance(seed, str)
        given: list = list(seed) if each else [seed] * prompts  # type: ignore[arg-type]
        if len(given) != prompts:
            raise ValueError(
                f"seed has {len(given)} entries; expected an integer, or one for each of {prompts} prompts"
            )
        seeds = [integer("seed", one, least=0) for one in given]
        if wrong := [one for one in seeds if one >= 1 << 64]:
            raise ValueError(f"seed is {wrong[0]}; expected at most 2^64 - 1")
        rows = [0] * prompts if each else range(prompts)
        self._seed = np.repeat(np.array(seeds, np.uint64), samples)
        self._row = np.repeat(np.array(rows, np.uint64), samples)
        self._sample = np.tile(np.arange(samples, dtype=np.uint64), prompts)

    def __call__(self, start: int, count: int) -> np.ndarray:
        """(count, b) float32: of the steps from `start`."""
        steps = np.arange(start, start + count, dtype=np.uint64)[:, None]
        zero = np.zeros_like(steps)
        words = philox((steps, self._row + zero, self._sample + zero, zero), self._seed)
        return (words[0] >> np.uint64(8)).astype(np.float32) * np.float32(2**-24)


def philox(counter: Sequence[np.ndarray], key: np.ndarray) -> tuple[np.ndarray, ...]:
    """Philox4x32-10: four words of 32 bits each, of four counters and a key of 64 bits, all in uint64 and broadcast."""
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    a, b, c, d = counter
    key_a, key_b = key & low, key >> shift
    for _ in range(10):
        left, right = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)
        a, b, c, d = (right >> shift) ^ b ^ key_a, right & low, (left >> shift) ^ d ^ key_b, left & low
        key_a, key_b = (key_a + np.uint64(0x9E3779B9)) & low, (key_b + np.uint64(0xBB67AE85)) & low
    return a, b, c, d


def integer(name: str, value, least: int | None = None) -> int:
    """The value as an int.

    Raises:
        TypeError: it is no integer.
        ValueError: it is below the least one.
    """
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} is {value!r}; expected an integer")
    try:
        found = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}; expected an integer") from None
    if least is not None and found < least:
        raise ValueError(f"{name} is {found}; expected at least {least}")
    return found


def _within(name: str, value: float, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}; expected a number from {low:g} to {high:g}")
