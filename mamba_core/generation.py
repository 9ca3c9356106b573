"""Generation: what to sample, when to stop, and how tokens become text. The arithmetic is each backend's `decode.py`.

From float32 logits (padded vocabulary entries removed) a token is chosen so, on every backend:
    1. repetition: a token already in the row, prompt included, has its logit divided by the penalty if positive, else
       multiplied (Keskar et al. 2019, arXiv:1909.05858, section 4.1).
    2. temperature: logits are divided by it; 0 takes the largest logit, the lower id of equals, and ends here.
    3. top_k, then top_p, then min_p: tokens ranked by probability, the lower id first among equals. top_k keeps the
       first k; top_p the shortest prefix with at least that probability; min_p those with at least that fraction of
       the largest probability. The most probable token is always kept.
    4. the token is the first, by id, at which the running sum of the kept probabilities exceeds u times their total.
u is `uniforms(seed, step, rows)`, the same numbers on every backend, so the same seed samples the same text on each
but where rounding moves a boundary across u.
"""

import codecs
import numbers
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from mamba_core import registry
from mamba_core.spec.checks import check_task
from mamba_core.spec.init import random_stream

# Of positive settings, well inside float32.
SMALLEST, LARGEST = 1e-20, 1e20


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen; see this module's docstring for the order and the meaning."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self):
        _within("temperature", self.temperature, 0.0, LARGEST)
        if 0.0 < self.temperature < SMALLEST:
            raise ValueError(f"temperature is {self.temperature!r}; expected 0 for greedy, or at least {SMALLEST}")
        _within("top_p", self.top_p, 0.0, 1.0)
        _within("min_p", self.min_p, 0.0, 1.0)
        if not (isinstance(self.top_k, int) and self.top_k >= 0):
            raise ValueError(f"top_k is {self.top_k!r}; expected an integer >= 0, 0 for all")
        _within("repetition_penalty", self.repetition_penalty, SMALLEST, LARGEST)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def filters(self) -> bool:
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0


def uniforms(seed: int, step: int, rows: int) -> np.ndarray:
    """(rows,) float32 in [0, 1): a row's number depends on the seed, the step and the row, not on the other rows."""
    return np.array([random_stream(seed, f"sample.{row}.{step}").random(dtype=np.float32) for row in range(rows)])


@dataclass
class Result:
    """What was generated, one entry a row.

    tokens: new token ids, the prompt excluded, the token that ended the row included.
    text: the same as text without what ended the row; None without a tokenizer.
    logprobs: of each new token under the model, before the filters.
    finish_reasons: "length", "eos" or "stop".
    """

    tokens: list[list[int]] = field(default_factory=list)
    text: list[str] | None = None
    logprobs: list[list[float]] = field(default_factory=list)
    finish_reasons: list[str] = field(default_factory=list)


class ByteTokenizer:
    """Text as its UTF-8 bytes: token i is byte i."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decoder(self):
        """A function from a token to the whole characters that it completes; `None` flushes."""
        incremental = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return lambda token: (
            incremental.decode(b"", final=True) if token is None else incremental.decode(bytes([token]))
        )


class SubwordTokenizer:
    """A `tokenizers.Tokenizer` from a tokenizer.json."""

    def __init__(self, path):
        try:
            import tokenizers
        except ModuleNotFoundError:
            raise ImportError("reading tokenizer.json needs tokenizers; pip install 'mamba_core[hub]'") from None
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as fault:  # tokenizers raises the bare class
            raise ValueError(f"{path}: not a tokenizer that can be read: {fault}") from None

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text).ids

    def decoder(self):
        """A function from a token to the whole characters that it completes; `None` flushes."""
        from tokenizers.decoders import DecodeStream

        pieces = DecodeStream(skip_special_tokens=True)
        return lambda token: "" if token is None else pieces.step(self._tokenizer, token) or ""


def tokenizer_of(model):
    """The tokenizer that came with the model's checkpoint; bytes for a vocabulary of 256; None if there is none."""
    folder = getattr(model, "source", None)
    if folder is not None and (folder / "tokenizer.json").is_file():
        return SubwordTokenizer(folder / "tokenizer.json")
    return ByteTokenizer() if model.config.vocab_size == 256 else None


def generate(
    model,
    prompts,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop: str | int | Sequence[str | int] = (),
    seed: int = 0,
    tokenizer=None,
) -> Result:
    """Continue a batch of prompts of any lengths; a row does not depend on its neighbours.

    Args:
        prompts: a text or a list of texts, or a list of token ids or a list of such lists.
        max_new_tokens: for each row.
        temperature, top_k, top_p, min_p, repetition_penalty, seed: see this module; temperature 0 is greedy.
        stop: token ids, or texts, at which a row ends; the config's eos_token_id always does.
        tokenizer: has `encode(text)` and `decoder()`; by default the checkpoint's own, or bytes for 256 entries.

    Raises:
        ValueError: the model is of another task than "lm", a prompt is empty and the config has no bos_token_id, a
            token is outside the vocabulary, or a setting is out of range.
    """
    check_task(model.config, "generating")
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    tokenizer = tokenizer or tokenizer_of(model)
    encoded = _encode(model.config, prompts, tokenizer)
    max_new_tokens = _limit(max_new_tokens)
    rows = [_Row(model.config, stop, tokenizer, max_new_tokens) for _ in encoded]
    for _ in _advance(model, encoded, sampling, rows, max_new_tokens):
        pass
    return Result(
        tokens=[row.tokens for row in rows],
        text=[row.text for row in rows] if tokenizer else None,
        logprobs=[row.logprobs for row in rows],
        finish_reasons=[row.finished for row in rows],
    )


def stream(model, prompt, *, max_new_tokens: int = 64, stop=(), tokenizer=None, **sampling) -> Iterator[str]:
    """Continue one prompt, yielding text as it comes, always whole characters; arguments as in `generate`."""
    check_task(model.config, "generating")
    tokenizer = tokenizer or tokenizer_of(model)
    if tokenizer is None:
        raise ValueError("streaming text needs a tokenizer; the model has none, so pass tokenizer=")
    encoded = _encode(model.config, prompt, tokenizer)
    if len(encoded) != 1:
        raise ValueError(f"stream continues one prompt; {len(encoded)} were given")
    max_new_tokens = _limit(max_new_tokens)
    row = _Row(model.config, stop, tokenizer, max_new_tokens)
    return _pieces(row, _advance(model, encoded, Sampling(**sampling), [row], max_new_tokens))


def _pieces(row: "_Row", steps: Iterator[None]) -> Iterator[str]:
    sent = 0
    for _ in steps:
        ready = row.ready()
        if ready > sent:
            yield row.text[sent:ready]
            sent = ready


class _Row:
    """One row's tokens and text so far, and why it ended."""

    def __init__(self, config, stop, tokenizer, limit: int):
        stops = [stop] if isinstance(stop, str) or not isinstance(stop, Iterable) else list(stop)
        self._stop_texts = [item for item in stops if isinstance(item, str)]
        self._stop_tokens = {_integer("stop", item) for item in stops if not isinstance(item, str)}
        if self._stop_texts and tokenizer is None:
            raise ValueError("stop has texts, which need a tokenizer; the model has none, so pass tokenizer= or ids")
        if "" in self._stop_texts:
            raise ValueError("stop has an empty text, which would end every row at once")
        self._eos = config.eos_token_ids
        self._decode = tokenizer.decoder() if tokenizer else (lambda token: "")
        self._limit = limit
        self.tokens, self.logprobs, self.text = [], [], ""
        self.finished = None

    def add(self, token: int, logprob: float) -> None:
        if self.finished:
            return
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if token in self._eos:
            self._finish("eos")
        elif token in self._stop_tokens:
            self._finish("stop")
        else:
            self.text += self._decode(token)
            if (at := min((self.text.find(text) for text in self._stop_texts if text in self.text), default=-1)) >= 0:
                self.text, self.finished = self.text[:at], "stop"
            elif len(self.tokens) == self._limit:
                self._finish("length")

    def ready(self) -> int:
        """How much of the text cannot be the beginning of a stop text."""
        if self.finished:
            return len(self.text)
        longest = max((len(text) for text in self._stop_texts), default=0)
        for held in range(min(longest - 1, len(self.text)), 0, -1):
            if any(text.startswith(self.text[-held:]) for text in self._stop_texts):
                return len(self.text) - held
        return len(self.text)

    def _finish(self, reason: str) -> None:
        self.text += self._decode(None)
        self.finished = reason


def _advance(model, encoded, sampling: Sampling, rows: list[_Row], limit: int) -> Iterator[None]:
    """Decode until every row has finished, filling the rows; yields after each token."""
    if limit == 0:
        for row in rows:
            row.finished = "length"
        return
    longest = max(len(prompt) for prompt in encoded)
    prompts = np.zeros((len(encoded), longest), np.int32)
    mask = np.zeros(prompts.shape, bool)
    for row, prompt in enumerate(encoded):
        prompts[row, : len(prompt)], mask[row, : len(prompt)] = prompt, True
    for tokens, logprobs in registry.get(model.backend).decode(model, prompts, mask, sampling):
        for row, token, logprob in zip(rows, tokens, logprobs, strict=True):
            row.add(int(token), float(logprob))
        yield
        if all(row.finished for row in rows):
            return


def _encode(config, prompts, tokenizer) -> list[list[int]]:
    """Prompts of any accepted form as a list of non-empty token lists."""
    if not isinstance(prompts, (str, Sequence, np.ndarray)):
        raise TypeError(f"prompts is {type(prompts).__name__}; expected text, token ids, or a list of either")
    if isinstance(prompts, str) or (len(prompts) and not isinstance(prompts[0], (str, Sequence, np.ndarray))):
        prompts = [prompts]
    if len(prompts) == 0:
        raise ValueError("prompts is empty; expected at least one")
    if any(isinstance(prompt, str) for prompt in prompts) and tokenizer is None:
        raise ValueError("the prompts are text and the model has no tokenizer; pass tokenizer= or token ids")
    encoded = [
        tokenizer.encode(item) if isinstance(item, str) else [_integer("a token", token) for token in item]
        for item in prompts
    ]
    for row, tokens in enumerate(encoded):
        if not tokens and config.bos_token_id is None:
            raise ValueError(f"prompt {row} is empty and the config has no bos_token_id; give at least one token")
        tokens[:] = tokens or [config.bos_token_id]
        if outside := [token for token in tokens if not 0 <= token < config.vocab_size]:
            raise ValueError(f"prompt {row} holds token {outside[0]}; vocab_size is {config.vocab_size}")
    return encoded


def _integer(name: str, value) -> int:
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} is {value!r}; expected an integer")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}; expected an integer") from None


def _limit(max_new_tokens) -> int:
    if _integer("max_new_tokens", max_new_tokens) < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; expected at least 0")
    return operator.index(max_new_tokens)


def _within(name: str, value: float, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}; expected a number from {low:g} to {high:g}")
