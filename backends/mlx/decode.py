"""Decoding: prefill, then one token at a time by a compiled step, sampled on the device."""

from collections.abc import Iterator
from itertools import count
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mamba_core.backend import State
from mamba_core.backends.mlx.arrays import from_numpy, to_numpy
from mamba_core.generation import Sampling, uniforms


class _Step(NamedTuple):
    """tokens, logprobs (b,); seen (b, v) bool: the token stood in the row before; state: before the tokens."""

    tokens: mx.array
    logprobs: mx.array
    seen: mx.array
    state: State


def decode(model, prompts, mask, sampling: Sampling, state: State | None = None) -> Iterator[tuple]:
    """A token is handed out while the next is being computed, so the last to be asked for is followed by one in vain."""

    def choose_next(hidden, seen, state, uniform):
        logits = model.head(hidden)[:, : model.config.vocab_size]
        return _Step(*choose(logits, seen, uniform, sampling), seen, state)

    def advance(step, uniform):
        seen = step.seen | (mx.arange(step.seen.shape[1]) == step.tokens[:, None])
        hidden, state = _forward(model, step.tokens[:, None], None, step.state)
        return choose_next(hidden[:, 0], seen, state, uniform)

    advance = mx.compile(advance)
    with model.on_device():
        hidden, state = _prefill(model, prompts, mask, state)
        step = choose_next(hidden, _seen(prompts, mask, model.config.vocab_size), state, _uniform(sampling, 0, prompts))
    for index in count(1):
        with model.on_device():
            following = advance(step, _uniform(sampling, index, prompts))
        mx.async_eval(following)
        yield to_numpy(step.tokens), to_numpy(step.logprobs)
        step = following


def choose(logits: mx.array, seen: mx.array, uniform: mx.array | None, sampling: Sampling) -> tuple[mx.array, mx.array]:
    """(tokens (b,), log-probabilities (b,)) from float32 logits (b, v), as `mamba_core.generation` says."""
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    if sampling.repetition_penalty != 1.0:
        penalised = mx.where(logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty)
        logits = mx.where(seen, penalised, logits)
    if sampling.greedy:
        tokens = mx.argmax(logits, axis=-1)
    else:
        running = mx.cumsum(filtered(logits / sampling.temperature, sampling), axis=-1)
        tokens = (running <= uniform[:, None] * running[:, -1:]).sum(axis=-1)
        # Rounding can put u times the total at the total itself: then the last token that was kept.
        tokens = mx.minimum(tokens, (running < running[:, -1:]).sum(axis=-1))
    tokens = tokens.astype(mx.int32)
    return tokens, mx.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]


def filtered(logits: mx.array, sampling: Sampling) -> mx.array:
    """Probabilities (b, v) with those that top_k, top_p and min_p reject at zero."""
    probabilities = mx.softmax(logits, axis=-1)
    if not sampling.filters:
        return probabilities
    # MLX sorts stably on every device: of equals the lower id comes first.
    order = mx.argsort(-probabilities, axis=-1)
    ranked = mx.take_along_axis(probabilities, order, axis=-1)
    rank = mx.arange(ranked.shape[-1])
    if sampling.top_k:
        ranked = mx.where(rank < sampling.top_k, ranked, 0.0)
    before = mx.cumsum(ranked, axis=-1) - ranked
    keep = (before < sampling.top_p * ranked.sum(axis=-1, keepdims=True)) | (rank == 0)
    keep = keep & (ranked >= sampling.min_p * ranked[:, :1])
    return mx.put_along_axis(mx.zeros_like(probabilities), order, mx.where(keep, ranked, 0.0), axis=-1)


def _prefill(model, prompts, mask, state) -> tuple[mx.array, State]:
    """The hidden state at each row's last position that counts, and the state after it."""
    state = model.init_state(len(prompts)) if state is None else state
    hidden, state = _forward(model, from_numpy(prompts), None if mask.all() else from_numpy(mask), state)
    return hidden[mx.arange(len(prompts)), from_numpy(mask.sum(1) - 1)], state


def _forward(model, tokens, mask, state):
    return model.backbone(tokens, state, mask, None, lambda name, value: value)


def _seen(prompts, mask, vocabulary) -> mx.array:
    """(b, v) bool: the token stands in the row."""
    seen = np.zeros((len(prompts), vocabulary), bool)
    rows, positions = mask.nonzero()
    seen[rows, prompts[rows, positions]] = True
    return from_numpy(seen)


def _uniform(sampling, step, prompts) -> mx.array | None:
    return None if sampling.greedy else from_numpy(uniforms(sampling.seed, step, len(prompts)))
