"""Decoding: prefill, then one token at a time by a step compiled where that pays, sampled on the device."""

from collections.abc import Iterator
from functools import partial
from itertools import count

import mlx.core as mx
from mlx.utils import tree_map

from mamba_core.backend import Carry, Choice, Context, Output, State
from mamba_core.backends.mlx.arrays import from_numpy, to_numpy
from mamba_core.backends.mlx.kernels import linear
from mamba_core.observe import unobserved
from mamba_core.sampling import Sampling

# Steps whose random numbers are brought to the device at once.
BLOCK = 64


def prefill(model, tokens, mask, state: State | None = None) -> Output:
    """Not compiled, for the native kernels are not to be had there."""
    state = model.init_state(len(tokens)) if state is None else state
    with model.on_device():
        own_mask = None if mask.all() else from_numpy(mask)
        hidden, state = model.backbone(from_numpy(tokens), state, own_mask, None, unobserved, last=True)
        prefilled = Output(model.head(hidden[:, -1])[:, : model.config.vocab_size], state)
        # Else the graph of all tokens, and what it holds, would live until the state is looked at.
        mx.eval(prefilled)
    return prefilled


def fork(values, rows):
    return tree_map(lambda value: value[from_numpy(rows)], values)


def decode(
    model, prefilled: Output, sampling: Sampling, *, context: Context | None = None, draw=None, limit: int | None = None
) -> Iterator[Choice]:
    """A token is handed out while the next is under way: without a limit what follows the last taken is in vain."""
    step = partial(advance, model, sampling=sampling)
    # Compiled, it would not have what is computed at once.
    if model.device != "cpu" or not linear.FASTER:
        step = mx.compile(step, inputs=model.state)
    uniforms = _uniforms(draw)
    with model.on_device():
        context = tree_map(lambda value: None if value is None else from_numpy(value), context)
        carry = begin(prefilled, context, next(uniforms), sampling)
    for made in count(1):
        more = limit is None or made < limit
        with model.on_device():
            following = step(carry, next(uniforms)) if more else carry
            mx.async_eval(following)
        yield _on_host(carry.choice)
        if not more:
            return
        carry = following


def begin(prefilled: Output, context: Context | None, uniform: mx.array | None, sampling: Sampling) -> Carry:
    """The first tokens."""
    choice = choose(prefilled.logits, context, uniform, sampling)
    return Carry(choice, prefilled.state, _with(context, choice.tokens))


def advance(model, carry: Carry, uniform: mx.array | None, sampling: Sampling) -> Carry:
    """One token more in each row."""
    hidden, state = model.backbone(carry.choice.tokens[:, None], carry.state, None, None, unobserved)
    logits = model.head(hidden[:, 0])[:, : model.config.vocab_size]
    return begin(Output(logits, state), carry.context, uniform, sampling)


def choose(logits: mx.array, context: Context | None, uniform: mx.array | None, sampling: Sampling) -> Choice:
    """See `mamba_core.sampling`."""
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    logits = _adjusted(logits, context, sampling)
    if sampling.greedy:
        tokens = mx.argmax(logits, axis=-1)
    else:
        probabilities = _filtered(logits, sampling)
        running = mx.cumsum(probabilities, axis=-1)
        # A sum in parallel may rise by rounding where nothing is added, or stay below u times the total at the end.
        kept = probabilities > 0
        reached = kept & (running > uniform[:, None] * running[:, -1:])
        last = kept.shape[-1] - 1 - mx.argmax(kept[:, ::-1], axis=-1)
        tokens = mx.where(reached.any(axis=-1), mx.argmax(reached, axis=-1), last)
    largest = logits.max(axis=-1)
    tokens = mx.where(mx.isfinite(largest), tokens, 0).astype(mx.int32)
    chosen = mx.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]
    chosen = mx.where(mx.isfinite(largest), chosen, mx.nan)
    chosen = mx.where(largest == -mx.inf, -mx.inf, chosen)
    if not sampling.top_logprobs:
        return Choice(tokens, chosen)
    order = mx.argsort(-logprobs, axis=-1)[:, : sampling.top_logprobs].astype(mx.int32)
    return Choice(tokens, chosen, order, mx.take_along_axis(logprobs, order, axis=-1))


def distribution(logits: mx.array, context: Context | None, sampling: Sampling) -> mx.array:
    """See `mamba_core.sampling`."""
    return _filtered(_adjusted(logits, context, sampling), sampling)


def _adjusted(logits: mx.array, context: Context | None, sampling: Sampling) -> mx.array:
    """Logits (b, v) after the bias, the penalties and the processors."""
    if context is None:
        return logits
    if context.bias is not None:
        logits = logits + context.bias
    generated = context.counts > 0
    if sampling.repetition_penalty != 1.0:
        penalised = mx.where(logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty)
        logits = mx.where(context.prompt | generated, penalised, logits)
    if sampling.frequency_penalty:
        logits = logits - sampling.frequency_penalty * context.counts
    if sampling.presence_penalty:
        logits = logits - sampling.presence_penalty * generated
    return sampling.processed(logits, context)


def _filtered(logits: mx.array, sampling: Sampling) -> mx.array:
    """Probabilities (b, v) with those that top_k, top_p and min_p reject at zero."""
    probabilities = mx.softmax((logits - logits.max(axis=-1, keepdims=True)) / sampling.temperature, axis=-1)
    if not sampling.filters:
        return probabilities
    # MLX sorts stably on every device: of equals the lower id comes first.
    order = mx.argsort(-probabilities, axis=-1)
    ranked = mx.take_along_axis(probabilities, order, axis=-1)
    rank = mx.arange(ranked.shape[-1])
    if sampling.top_k:
        ranked = mx.where(rank < sampling.top_k, ranked, 0.0)
    if sampling.top_p < 1.0:
        before = mx.cumsum(ranked, axis=-1) - ranked
        ranked = mx.where((before < sampling.top_p * ranked.sum(axis=-1, keepdims=True)) | (rank == 0), ranked, 0.0)
    ranked = mx.where(ranked >= sampling.min_p * ranked[:, :1], ranked, 0.0)
    return mx.put_along_axis(mx.zeros_like(probabilities), order, ranked, axis=-1)


def _with(context: Context | None, tokens: mx.array) -> Context | None:
    """The context after these tokens."""
    if context is None:
        return None
    counts = context.counts.at[mx.arange(len(tokens)), tokens].add(1)
    return context._replace(last=tokens, counts=counts, step=context.step + 1)


def _uniforms(draw) -> Iterator[mx.array | None]:
    """(b,) for each step; None where nothing is drawn."""
    for start in count(0, BLOCK):
        yield from [None] * BLOCK if draw is None else from_numpy(draw(start, BLOCK))


def _on_host(choice: Choice) -> Choice:
    return tree_map(lambda value: None if value is None else to_numpy(value), choice)
