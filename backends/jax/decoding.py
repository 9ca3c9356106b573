"""Decoding: a compiled prefill, then compiled blocks of tokens, sampled on the device.

Programs are compiled for a config and a batch; the prefill for a bucket of lengths, the others for sampling settings.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from mamba_core.backend import Carry, Choice, Context, Output, State
from mamba_core.backends.jax import state as states
from mamba_core.backends.jax.arrays import from_numpy, to_numpy
from mamba_core.backends.jax.positions import call_of
from mamba_core.backends.jax.programs import after_call, divided, methods_in, put_back, whole
from mamba_core.sampling import Sampling
from mamba_core.wrappers import checked_output

# Tokens between two looks of the host, which cost a fraction of a millisecond each.
BLOCK = 16
# Tokens that a growing state is given room for at once: a program is compiled for each capacity.
AHEAD = 1024


def prefill(model, tokens, mask, state: State | None = None) -> Output:
    length = mask.shape[1]
    padding = ((0, 0), (_bucket(length) - length, 0), (0, 0))
    tokens, mask = (
        from_numpy(np.pad(value, padding[: np.ndim(value)]), device=model.device) for value in (tokens, mask)
    )
    state = None if state is None else states.with_room(model.config, state, length)
    graph, *variables = divided(model)
    output, others = _prefill(graph, methods_in(graph), *variables, tokens, mask, state)
    put_back(model, others)
    return output


def fork(values, rows):
    return jax.tree.map(lambda value: value[jnp.asarray(rows)], values)


def decode(
    model, prefilled: Output, sampling: Sampling, *, context: Context | None = None, draw=None, limit: int | None = None
) -> Iterator[Choice]:
    """The first token comes alone, and the blocks double up to BLOCK, so that few tokens are computed in vain."""
    context = jax.tree.map(lambda value: from_numpy(value, device=model.device), context)
    # Not `nnx.jit`, which returns the parameters, and so copies them in every call.
    graph, parameters, others = divided(model)
    program = functools.partial(_advance, graph, methods_in(graph), parameters, sampling=sampling)
    carry = _begin(prefilled, context, None if draw is None else draw(0, 1)[0], sampling=sampling)
    yield jax.tree.map(to_numpy, carry.choice)
    # A copy, because each call reuses the memory of its state; the prefilled state must stay as it is.
    made, carry = 1, carry._replace(state=jax.tree.map(jnp.copy, carry.state))
    left = states.room(model.config, carry.state)
    while limit is None or made < limit:
        count = min(made, BLOCK, BLOCK if limit is None else limit - made)
        if left is not None:
            more = AHEAD if limit is None else min(AHEAD, limit - made)
            if left < (more if made == 1 else count):
                carry = carry._replace(state=states.with_room(model.config, carry.state, more))
                left = states.room(model.config, carry.state)
            left -= count
        drawn = None if draw is None else draw(made, BLOCK)
        carry, choices, others = program(others, *_divided(carry), drawn, count)
        put_back(model, others)
        choices = jax.tree.map(to_numpy, choices)
        for index in range(count):
            yield jax.tree.map(lambda value, index=index: value[index], choices)
        made += count


def begin(prefilled: Output, context: Context | None, uniform: jax.Array | None, sampling: Sampling) -> Carry:
    """The first tokens."""
    choice = choose(prefilled.logits, context, uniform, sampling)
    return Carry(choice, prefilled.state, _updated(context, choice.tokens))


def advance(model, carry: Carry, uniform: jax.Array | None, sampling: Sampling) -> Carry:
    """One token more in each row."""
    return begin(_called(model, carry.choice.tokens[:, None], carry.state), carry.context, uniform, sampling)


def choose(logits: jax.Array, context: Context | None, uniform: jax.Array | None, sampling: Sampling) -> Choice:
    """See `mamba_core.sampling`."""
    logprobs = jax.nn.log_softmax(logits)
    logits = _adjusted(logits, context, sampling)
    if sampling.greedy:
        tokens = logits.argmax(-1)
    else:
        probabilities = _filtered(logits, sampling)
        running = probabilities.cumsum(-1)
        # A sum in parallel may rise by rounding where nothing is added, or stay below u times the total at the end.
        kept = probabilities > 0
        reached = kept & (running > uniform[:, None] * running[:, -1:])
        last = kept.shape[-1] - 1 - kept[:, ::-1].argmax(-1)
        tokens = jnp.where(reached.any(-1), reached.argmax(-1), last)
    largest = logits.max(-1)
    tokens = jnp.where(jnp.isfinite(largest), tokens, 0).astype(jnp.int32)
    chosen = jnp.take_along_axis(logprobs, tokens[:, None], axis=1)[:, 0]
    chosen = jnp.where(jnp.isfinite(largest), chosen, jnp.nan)
    chosen = jnp.where(largest == -jnp.inf, -jnp.inf, chosen)
    if not sampling.top_logprobs:
        return Choice(tokens, chosen)
    # Of equals the lower id comes first.
    ranked, order = lax.top_k(logprobs, min(sampling.top_logprobs, logprobs.shape[-1]))
    return Choice(tokens, chosen, order, ranked)


def distribution(logits: jax.Array, context: Context | None, sampling: Sampling) -> jax.Array:
    """See `mamba_core.sampling`."""
    return _filtered(_adjusted(logits, context, sampling), sampling)


def _adjusted(logits: jax.Array, context: Context | None, sampling: Sampling) -> jax.Array:
    """Logits (b, v) after the bias, the penalties and the processors."""
    if context is None:
        return logits
    if context.bias is not None:
        logits = logits + context.bias
    generated = context.counts > 0
    if sampling.repetition_penalty != 1.0:
        penalised = jnp.where(logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty)
        logits = jnp.where(context.prompt | generated, penalised, logits)
    if sampling.frequency_penalty:
        logits = logits - sampling.frequency_penalty * context.counts
    if sampling.presence_penalty:
        logits = logits - sampling.presence_penalty * generated
    return sampling.processed(logits, context)


def _filtered(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Probabilities (b, v) with those that top_k, top_p and min_p reject at zero."""
    probabilities = jax.nn.softmax((logits - logits.max(-1, keepdims=True)) / sampling.temperature)
    if not sampling.filters:
        return probabilities
    vocabulary = logits.shape[-1]
    # lax.top_k too puts the lower id first among equals.
    ranked, order = lax.top_k(probabilities, min(sampling.top_k or vocabulary, vocabulary))
    if sampling.top_p < 1.0:
        before, rank = ranked.cumsum(-1) - ranked, jnp.arange(ranked.shape[-1])
        ranked = jnp.where((before < sampling.top_p * ranked.sum(-1, keepdims=True)) | (rank == 0), ranked, 0.0)
    ranked = jnp.where(ranked >= sampling.min_p * ranked[:, :1], ranked, 0.0)
    rows = jnp.arange(len(ranked))[:, None]
    return jnp.zeros_like(probabilities).at[rows, order].set(ranked)


def _updated(context: Context | None, tokens: jax.Array) -> Context | None:
    """The context after these tokens."""
    if context is None:
        return None
    counts = context.counts.at[jnp.arange(len(tokens)), tokens].add(1)
    return context._replace(last=tokens, counts=counts, step=context.step + 1)


# What is compiled for a graph holds for the methods that its classes have.
@functools.partial(jax.jit, static_argnames=("graph", "methods"))
def _prefill(graph, methods, parameters, others, tokens, mask, state) -> tuple[Output, nnx.State]:
    model = whole(graph, parameters, others)
    return _called(model, tokens, state, mask), after_call(model, graph, parameters)


def _called(model, inputs, state, mask=None) -> Output:
    """The logits (b, v) at the last column, padded vocabulary removed, and the state.

    A model that was changed is called, with no more than what a call of its own might take.
    """
    if model.is_built:
        rows, length = inputs.shape[:2]
        call = call_of(mask, None, length=length, last=length > 1, fresh=state is None)
        state = model.init_state(rows, length) if state is None else state
        hidden, state = model.backbone_of(inputs, state, call)
        logits = model.head(hidden[:, -1])
    else:
        positions = {} if mask is None else {"mask": mask}
        if jnp.issubdtype(inputs.dtype, jnp.floating):
            out = model(inputs_embeds=inputs, state=state, **positions)
        else:
            out = model(inputs, state=state, **positions)
        out = checked_output(model, out)
        logits, state = out.logits[:, -1].astype(jnp.float32), out.state
    return Output(logits[:, : model.config.vocab_size], state)


def _divided(carry: Carry) -> tuple[State, Carry]:
    """The state, whose memory may be reused, and the rest, at which the host may still look."""
    return carry.state, carry._replace(state=None)


_begin = jax.jit(begin, static_argnames=("sampling",))


@functools.partial(jax.jit, static_argnames=("graph", "methods", "sampling"), donate_argnames=("state",))
def _advance(graph, methods, parameters, variables, state, others, uniforms, count, *, sampling):
    """`count` more tokens, in the first rows of the choices (BLOCK, b); the other rows mean nothing.

    variables: those that a call may change, which are returned last.
    """
    carry = others._replace(state=state)

    def position(index, loop):
        carry, choices, variables = loop
        model = whole(graph, parameters, variables)
        carry = advance(model, carry, None if uniforms is None else uniforms[index], sampling)
        choices = jax.tree.map(lambda all, one: all.at[index].set(one), choices, carry.choice)
        return carry, choices, after_call(model, graph, parameters)

    empty = jax.tree.map(lambda value: jnp.zeros((BLOCK, *value.shape), value.dtype), carry.choice)
    return lax.fori_loop(0, count, position, (carry, empty, variables))


def _bucket(length: int) -> int:
    """The length up to which a prompt is padded: in steps of a quarter of the next power of two, at least 16."""
    step = max(16, (1 << (length - 1).bit_length()) // 4)
    return -(-length // step) * step
