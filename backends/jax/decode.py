"""Decoding: a compiled prefill, then compiled blocks of tokens, sampled on the device.

A program is compiled for a config, a batch, a sampling policy and, for the prefill, a bucket of prompt lengths.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from mamba_core.backend import State
from mamba_core.backends.jax.arrays import from_numpy, to_numpy
from mamba_core.generation import Sampling, uniforms
from mamba_core.observe import unobserved

# Tokens between two looks of the host, which cost a fraction of a millisecond each.
BLOCK = 16


def decode(model, prompts, mask, sampling: Sampling, state: State | None = None) -> Iterator[tuple]:
    """The first token comes alone and the blocks double up to BLOCK, so that little is computed that nobody takes."""
    rows, length = prompts.shape
    padding = ((0, 0), (0, _bucket(length) - length))
    prompts, mask = (from_numpy(np.pad(value, padding), device=model.device) for value in (prompts, mask))
    state = model.init_state(rows) if state is None else state
    # The seed is in the uniforms; another one must not compile again.
    policy = dataclasses.replace(sampling, seed=0)
    # Not `nnx.jit`, which returns the parameters, and so copies them in every call.
    graph, parameters = nnx.split(model)
    first = _uniforms(sampling, 0, 1, rows)[0]
    carry = _prefill(graph, parameters, prompts, mask, state, first, sampling=policy)
    yield to_numpy(carry.tokens), to_numpy(carry.logprobs)
    step = 1
    while True:
        count = min(step, BLOCK)
        drawn = _uniforms(sampling, step, count, rows)
        carry, chosen = _advance(graph, parameters, carry, drawn, count, sampling=policy)
        tokens, logprobs = (to_numpy(value) for value in chosen)
        yield from zip(tokens[:count], logprobs[:count], strict=True)
        step += count


def choose(logits: jax.Array, seen: jax.Array, uniform: jax.Array, sampling: Sampling) -> tuple[jax.Array, jax.Array]:
    """(tokens (b,), log-probabilities (b,)) from float32 logits (b, v), as `mamba_core.generation` says."""
    logprobs = jax.nn.log_softmax(logits)
    if sampling.repetition_penalty != 1.0:
        penalised = jnp.where(logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty)
        logits = jnp.where(seen, penalised, logits)
    if sampling.greedy:
        tokens = logits.argmax(-1)
    else:
        probabilities = filtered((logits - logits.max(-1, keepdims=True)) / sampling.temperature, sampling)
        running = probabilities.cumsum(-1)
        # A sum in parallel may rise by rounding where nothing is added, or stay below u times the total at the end.
        kept = probabilities > 0
        reached = kept & (running > uniform[:, None] * running[:, -1:])
        last = kept.shape[-1] - 1 - kept[:, ::-1].argmax(-1)
        tokens = jnp.where(reached.any(-1), reached.argmax(-1), last)
    return tokens, jnp.take_along_axis(logprobs, tokens[:, None], axis=1)[:, 0]


def filtered(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Probabilities (b, v) with those that top_k, top_p and min_p reject at zero."""
    probabilities = jax.nn.softmax(logits)
    if not sampling.filters:
        return probabilities
    vocabulary = logits.shape[-1]
    # lax.top_k too puts the lower id first among equals.
    ranked, order = lax.top_k(probabilities, min(sampling.top_k or vocabulary, vocabulary))
    before = ranked.cumsum(-1) - ranked
    keep = (before < sampling.top_p * ranked.sum(-1, keepdims=True)) | (jnp.arange(ranked.shape[-1]) == 0)
    keep = keep & (ranked >= sampling.min_p * ranked[:, :1])
    rows = jnp.arange(len(ranked))[:, None]
    return jnp.zeros_like(probabilities).at[rows, order].set(jnp.where(keep, ranked, 0.0))


class _Carry(NamedTuple):
    """The last tokens (b,) and their log-probabilities, the state before them, and `_seen` with them."""

    tokens: jax.Array
    logprobs: jax.Array
    state: State
    seen: jax.Array


@functools.partial(jax.jit, static_argnames=("graph", "sampling"))
def _prefill(graph, parameters, prompts, mask, state, uniform, *, sampling) -> _Carry:
    """The first tokens, from each row's last position that counts."""
    model = nnx.merge(graph, parameters)
    hidden, state = _forward(model, prompts, mask, state)
    last = mask.sum(1) - 1
    seen = _seen(prompts, mask, model.config.vocab_size)
    return _chosen(model, hidden[jnp.arange(len(prompts)), last], state, seen, uniform, sampling)


@functools.partial(jax.jit, static_argnames=("graph", "sampling"))
def _advance(graph, parameters, carry, uniforms, count, *, sampling) -> tuple[_Carry, tuple[jax.Array, jax.Array]]:
    """`count` more tokens; what stands behind them in the (BLOCK, b) tokens and log-probabilities means nothing."""
    model = nnx.merge(graph, parameters)

    def position(index, loop):
        carry, tokens, logprobs = loop
        hidden, state = _forward(model, carry.tokens[:, None], None, carry.state)
        carry = _chosen(model, hidden[:, 0], state, carry.seen, uniforms[index], sampling)
        return carry, tokens.at[index].set(carry.tokens), logprobs.at[index].set(carry.logprobs)

    empty = (jnp.zeros(uniforms.shape, carry.tokens.dtype), jnp.zeros(uniforms.shape, carry.logprobs.dtype))
    carry, *chosen = lax.fori_loop(0, count, position, (carry, *empty))
    return carry, tuple(chosen)


def _chosen(model, hidden, state, seen, uniform, sampling) -> _Carry:
    logits = model.head(hidden)[:, : model.config.vocab_size]
    tokens, logprobs = choose(logits, seen, uniform, sampling)
    return _Carry(tokens, logprobs, state, seen.at[jnp.arange(len(tokens)), tokens].set(True))


def _forward(model, tokens, mask, state):
    return model.backbone(tokens, state, mask, None, unobserved)


def _seen(prompts, mask, vocabulary) -> jax.Array:
    """(b, v) bool: the token stands in the row."""
    seen = jnp.zeros((len(prompts), vocabulary), bool)
    rows = jnp.arange(len(prompts))[:, None]
    return seen.at[rows, jnp.where(mask, prompts, vocabulary)].set(True, mode="drop")


def _bucket(length: int) -> int:
    """The length up to which a prompt is padded: in steps of a quarter of the next power of two, at least 16."""
    step = max(16, (1 << (length - 1).bit_length()) // 4)
    return -(-length // step) * step


def _uniforms(sampling: Sampling, start: int, count: int, rows: int) -> np.ndarray:
    """(BLOCK, rows), of which the first `count` are drawn."""
    drawn = np.zeros((BLOCK, rows), np.float32)
    if not sampling.greedy:
        drawn[:count] = [uniforms(sampling.seed, step, rows) for step in range(start, start + count)]
    return drawn
