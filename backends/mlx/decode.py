"""Decoding: prefill, then one token at a time by a compiled step, sampled on the device."""

from collections.abc import Iterator
from itertools import count

import mlx.core as mx
import numpy as np

from mamba_core.backend import State
from mamba_core.backends.mlx.arrays import from_numpy, to_numpy
from mamba_core.generation import Sampling, uniforms
from mamba_core.observe import unobserved


def decode(model, prompts, mask, sampling: Sampling, state: State | None = None) -> Iterator[tuple]:
    """A token is handed out while the next is under way: what follows the last that is asked for is in vain."""
    vocabulary = model.config.vocab_size

    def advance(tokens, state):
        hidden, state = _forward(model, tokens[:, None], None, state)
        return model.head(hidden[:, 0]), state

    advance = mx.compile(advance, inputs=model.state)
    with model.on_device():
        hidden, state = _prefill(model, prompts, mask, state)
        logits, seen = model.head(hidden), _seen(prompts, mask, vocabulary)
    for step in count():
        with model.on_device():
            uniform = None if sampling.greedy else from_numpy(uniforms(sampling.seed, step, len(prompts)))
            tokens, logprobs = choose(logits[:, :vocabulary], seen, uniform, sampling)
            mx.async_eval(tokens, logprobs)
            seen = seen | (mx.arange(vocabulary) == tokens[:, None])
            logits, state = advance(tokens, state)
            mx.async_eval(logits, state, seen)
        yield to_numpy(tokens), to_numpy(logprobs)


def choose(logits: mx.array, seen: mx.array, uniform: mx.array | None, sampling: Sampling) -> tuple[mx.array, mx.array]:
    """(tokens (b,), log-probabilities (b,)) from float32 logits (b, v), as `mamba_core.generation` says."""
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    if sampling.repetition_penalty != 1.0:
        penalised = mx.where(logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty)
        logits = mx.where(seen, penalised, logits)
    if sampling.greedy:
        tokens = mx.argmax(logits, axis=-1)
    else:
        probabilities = filtered((logits - logits.max(axis=-1, keepdims=True)) / sampling.temperature, sampling)
        running = mx.cumsum(probabilities, axis=-1)
        # A sum in parallel may rise by rounding where nothing is added, or stay below u times the total at the end.
        kept = probabilities > 0
        reached = kept & (running > uniform[:, None] * running[:, -1:])
        last = kept.shape[-1] - 1 - mx.argmax(kept[:, ::-1], axis=-1)
        tokens = mx.where(reached.any(axis=-1), mx.argmax(reached, axis=-1), last)
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
    return model.backbone(tokens, state, mask, None, unobserved)


def _seen(prompts, mask, vocabulary) -> mx.array:
    """(b, v) bool: the token stands in the row."""
    seen = np.zeros((len(prompts), vocabulary), bool)
    rows, positions = mask.nonzero()
    seen[rows, prompts[rows, positions]] = True
    return from_numpy(seen)
