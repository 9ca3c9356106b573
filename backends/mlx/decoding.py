"""Decoding: a prefill, then one token at a time, sampled on the device. The step is compiled where that pays."""

from collections.abc import Iterator
from functools import partial
from itertools import count

import mlx.core as mx
from mlx.utils import tree_map

from mamba_core.backend import Carry, Choice, Context, Output, State
from mamba_core.backends.mlx import state as states
from mamba_core.backends.mlx.arrays import from_numpy, to_numpy
from mamba_core.backends.mlx.heads import model_class
from mamba_core.backends.mlx.kernels import numpy_linear
from mamba_core.backends.mlx.model import Backbone
from mamba_core.backends.mlx.positions import call_of
from mamba_core.backends.mlx.untouched import untouched
from mamba_core.sampling import Sampling
from mamba_core.spec.checks import check_steps
from mamba_core.wrappers import checked_output

# The random numbers of so many steps are brought to the device at once.
BLOCK = 64


def prefill(model, tokens, mask, state: State | None = None) -> Output:
    """Not compiled: native kernels do not work inside mx.compile."""
    check_steps(model.config, "prefill")
    rows, length = tokens.shape[:2]
    with model.on_device():
        fresh = state is None
        state = model.init_state(rows, length) if fresh else states.with_room(model.config, state, length)
        needed_mask = None if mask.all() else from_numpy(mask)
        prefilled = _after(model, from_numpy(tokens), state, needed_mask, last=True, fresh=fresh)
        # Computed now: the graph of all tokens, and what it holds, would live until somebody looks at the state.
        mx.eval(prefilled)
    return prefilled


def infer(model, inputs, state: State | None = None, **arrays):
    """Not compiled, as `prefill`."""
    with model.on_device():
        given = {name: _own(value) for name, value in arrays.items() if value is not None}
        state = None if state is None else states.with_room(model.config, state, inputs.shape[1])
        output = checked_output(model, model(_own(inputs), state, **given))
        mx.eval(output)
    return output


def _own(value) -> mx.array:
    return value if isinstance(value, mx.array) else from_numpy(value)


def fork(values, rows):
    return tree_map(lambda value: value[from_numpy(rows)], values)


def decode(
    model, prefilled: Output, sampling: Sampling, *, context: Context | None = None, draw=None, limit: int | None = None
) -> Iterator[Choice]:
    """Yields a token while the next is being computed; without a limit the last computation is wasted."""
    step = partial(advance, model, sampling=sampling)
    # Not on a CPU where NumPy multiplies: that does not work inside mx.compile.
    if model.device != "cpu" or not numpy_linear.NUMPY_IS_FASTER:
        step = mx.compile(step, inputs=[model.state, mx.random.state], outputs=[mx.random.state])
    uniforms = _uniforms(draw)
    with model.on_device():
        context = tree_map(lambda value: None if value is None else from_numpy(value), context)
        carry = begin(prefilled, context, next(uniforms), sampling)
        left = states.room(model.config, carry.state)
    for made in count(1):
        more = limit is None or made < limit
        with model.on_device():
            if left is not None:
                if left == 0:
                    carry = carry._replace(state=states.with_room(model.config, carry.state, 1))
                    left = states.room(model.config, carry.state)
                left -= 1
            following = step(carry, next(uniforms)) if more else carry
            mx.async_eval(following)
        yield _on_host(carry.choice)
        if not more:
            return
        carry = following


def begin(prefilled: Output, context: Context | None, uniform: mx.array | None, sampling: Sampling) -> Carry:
    """The first tokens."""
    choice = choose(prefilled.logits, context, uniform, sampling)
    return Carry(choice, prefilled.state, _updated(context, choice.tokens))


def advance(model, carry: Carry, uniform: mx.array | None, sampling: Sampling) -> Carry:
    """One token more in each row."""
    after = _after(model, carry.choice.tokens[:, None], carry.state)
    return begin(after, carry.context, uniform, sampling)


def _after(model, inputs: mx.array, state: State, mask: mx.array | None = None, *, last=False, fresh=False) -> Output:
    """Logits (b, v) after the last position, and the state. By the model's own call where somebody changed that.

    last: the backbone need not give the other positions. fresh: the state is that before any position.
    """
    if untouched(model_class(model.config.task), model):
        last = last and untouched(Backbone, model.backbone)
        call = call_of(mask, None, length=inputs.shape[1], last=last, fresh=fresh)
        hidden, state = model.backbone(inputs, state, call)
        return Output(model.head(hidden[:, -1])[:, : model.config.vocab_size], state)
    # No argument that another call need not have.
    given = {} if mask is None else {"mask": mask}
    if mx.issubdtype(inputs.dtype, mx.floating):
        output = model(None, state, inputs_embeds=inputs, **given)
    else:
        output = model(inputs, state=state, **given)
    output = checked_output(model, output)
    return Output(output.logits[:, -1, : model.config.vocab_size].astype(mx.float32), output.state)


def choose(logits: mx.array, context: Context | None, uniform: mx.array | None, sampling: Sampling) -> Choice:
    """See `mamba_core.sampling`."""
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    logits = _adjusted(logits, context, sampling)
    if sampling.greedy:
        tokens = mx.argmax(logits, axis=-1)
    else:
        probabilities = _filtered(logits, sampling)
        running = mx.cumsum(probabilities, axis=-1)
        # By rounding a parallel sum may rise where nothing is added, or end below u times the total.
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
    """Probabilities (b, v); zero for the tokens that top_k, top_p and min_p reject."""
    probabilities = mx.softmax((logits - logits.max(axis=-1, keepdims=True)) / sampling.temperature, axis=-1)
    if not sampling.filters:
        return probabilities
    # MLX's sort is stable on every device: among equals the lower id comes first.
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


def _updated(context: Context | None, tokens: mx.array) -> Context | None:
    """The context after these tokens."""
    if context is None:
        return None
    counts = context.counts.at[mx.arange(len(tokens)), tokens].add(1)
    return context._replace(last=tokens, counts=counts, step=context.step + 1)


def _uniforms(draw) -> Iterator[mx.array | None]:
    """The numbers of each step, (b,); None where nothing is drawn."""
    for start in count(0, BLOCK):
        yield from [None] * BLOCK if draw is None else from_numpy(draw(start, BLOCK))


def _on_host(choice: Choice) -> Choice:
    return tree_map(lambda value: None if value is None else to_numpy(value), choice)
