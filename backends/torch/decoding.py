"""Decoding: prefill, then one token at a time, sampled on the device."""

from collections.abc import Iterator
from functools import partial
from itertools import count

import torch
from torch import Tensor

from mamba_core.backend import Carry, Choice, Context, Output, State
from mamba_core.backends.torch import state as states
from mamba_core.backends.torch.arrays import at_least_float32, from_numpy
from mamba_core.backends.torch.kernels import triton
from mamba_core.backends.torch.kernels.cuda_graph import CapturedCache, CapturedDecoding
from mamba_core.backends.torch.kernels.triton_choice import likeliest
from mamba_core.backends.torch.positions import call_of
from mamba_core.backends.torch.private import tree_map
from mamba_core.backends.torch.ways import cuda_step
from mamba_core.sampling import Sampling
from mamba_core.wrappers import checked_output

# How many steps' random numbers are copied to the device at once.
BLOCK = 64
# What was captured for a model and is not in use.
_captured = CapturedCache()


@torch.no_grad()
def prefill(model, tokens, mask, state: State | None = None) -> Output:
    """Not in inference mode, because autograd would refuse the state."""
    rows, length = tokens.shape[:2]
    fresh = state is None
    state = model.init_state(rows, length) if fresh else states.with_room(model.config, state, length)
    needed_mask = None if mask.all() else from_numpy(mask, device=model.device)
    inputs = from_numpy(tokens, device=model.device)
    if not model.is_untouched():
        return _called(model, inputs, state, needed_mask)
    call = call_of(needed_mask, None, length=length, last=True, fresh=fresh)
    hidden, state = model.backbone(inputs, state, call)
    return Output(model.head(hidden[:, -1])[:, : model.config.vocab_size], state)


def _called(model, inputs: Tensor, state: State, mask: Tensor | None = None) -> Output:
    """The last position's logits (b, v), by the model's own call; without arguments that another call need not have."""
    given = {} if mask is None else {"mask": mask}
    if inputs.is_floating_point():
        out = model(inputs_embeds=inputs, state=state, **given)
    else:
        out = model(inputs, state=state, **given)
    out = checked_output(model, out)
    return Output(at_least_float32(out.logits[:, -1, : model.config.vocab_size]), out.state)


@torch.no_grad()
def fork(values, rows):
    def selected(value):
        return value[torch.as_tensor(rows, dtype=torch.long, device=value.device)]

    return tree_map(selected, values)


def decode(
    model, prefilled: Output, sampling: Sampling, *, context: Context | None = None, draw=None, limit: int | None = None
) -> Iterator[Choice]:
    """Without gradients; the model is not changed.

    Not in inference mode where modules were changed: what these keep of a call could not be trained later.
    """
    mode = torch.inference_mode if model.is_untouched() and model.backbone.is_untouched() else torch.no_grad
    return mode()(_decoded)(model, prefilled, sampling, context, draw, limit)


def _decoded(model, prefilled, sampling, context, draw, limit) -> Iterator[Choice]:
    # torch's trees treat None as a leaf.
    context = tree_map(lambda value: None if value is None else from_numpy(value, device=model.device), context)
    uniforms = _uniforms(model, draw)
    carry = begin(prefilled, context, next(uniforms), sampling)
    yield _on_host(carry.choice)
    if limit != 1 and _captures(model, sampling):
        yield from _replayed(model, carry, sampling, draw, limit)
        return
    left = states.room(model.config, carry.state)
    for step in count(1) if limit is None else range(1, limit):
        if left is not None:
            if left == 0:
                carry = carry._replace(state=states.with_room(model.config, carry.state, 1))
                left = states.room(model.config, carry.state)
            left -= 1
        # The first state is the caller's; those after it are held here alone.
        carry = advance(model, carry, next(uniforms), sampling, in_place=step > 1)
        yield _on_host(carry.choice)


def begin(prefilled: Output, context: Context | None, uniform: Tensor | None, sampling: Sampling) -> Carry:
    """The first tokens."""
    choice = choose(prefilled.logits, context, uniform, sampling)
    return Carry(choice, prefilled.state, _updated(context, choice.tokens))


def advance(model, carry: Carry, uniform: Tensor | None, sampling: Sampling, in_place: bool = False) -> Carry:
    """One token more in each row. in_place: caches that have room may be written where they are."""
    tokens = carry.choice.tokens[:, None]
    if not model.is_untouched():
        return begin(_called(model, tokens, carry.state), carry.context, uniform, sampling)
    # The states of a growing cache alone: others are new in each step, or in the memory of the way cuda_step.
    call = call_of(None, None, length=1, in_place=in_place)
    hidden, state = model.backbone(tokens, carry.state, call)
    logits = model.head(hidden[:, 0])[:, : model.config.vocab_size]
    return begin(Output(logits, state), carry.context, uniform, sampling)


def _advance_in_place(model, carry: Carry, uniform: Tensor | None, *, sampling: Sampling) -> Carry:
    """`advance` by the way cuda_step, in the memory of the state."""
    logits = cuda_step.logits(model, carry.choice.tokens, carry.state)[:, : model.config.vocab_size]
    return begin(Output(logits, carry.state), carry.context, uniform, sampling)


def _captures(model, sampling: Sampling) -> bool:
    """Whether steps are captured: on a GPU, without logits processors, which may look at their arguments' values."""
    return not sampling.processors and cuda_step.decodes(model)


def _replayed(model, carry, sampling, draw, limit) -> Iterator[Choice]:
    context = None if carry.context is None else carry.context.bias is None
    weights = tuple(value.data_ptr() for value in (*model.parameters(), *model.buffers()))
    key = (len(carry.choice.tokens), sampling, draw is None, context, weights)
    step = partial(_advance_in_place, model, sampling=sampling)
    decoding = _captured.take(model, key, lambda: CapturedDecoding(step, carry, draw is not None))
    try:
        yield from decoding.run(carry, draw, limit)
    finally:
        _captured.give_back(model, key, decoding)


def choose(logits: Tensor, context: Context | None, uniform: Tensor | None, sampling: Sampling) -> Choice:
    """See `mamba_core.sampling`."""
    needs_all = context is not None or sampling.top_logprobs or not sampling.greedy
    if not needs_all and triton.reason(logits.device, logits.dtype) is None:
        return Choice(*likeliest(logits))
    logprobs = logits.log_softmax(-1)
    logits = _adjusted(logits, context, sampling)
    # Not argmax and amax: with many logits they start PyTorch's threads, which then spin during the next step.
    largest, tokens = logits.max(-1)
    if not sampling.greedy:
        probabilities = _filtered(logits, sampling)
        running = probabilities.cumsum(-1)
        # A sum in parallel may rise by rounding where nothing is added, or stay below u times the total at the end.
        kept = probabilities > 0
        reached = kept & (running > uniform[:, None] * running[:, -1:])
        last = kept.shape[-1] - 1 - kept.flip(-1).int().argmax(-1)
        tokens = torch.where(reached.any(-1), reached.int().argmax(-1), last)
    tokens = torch.where(largest.isfinite(), tokens, 0)
    chosen = torch.where(largest.isfinite(), logprobs.gather(1, tokens[:, None])[:, 0], torch.nan)
    chosen = torch.where(largest == -torch.inf, -torch.inf, chosen)
    if not sampling.top_logprobs:
        return Choice(tokens, chosen)
    ranked, order = logprobs.sort(dim=-1, descending=True, stable=True)
    return Choice(tokens, chosen, order[:, : sampling.top_logprobs], ranked[:, : sampling.top_logprobs])


def distribution(logits: Tensor, context: Context | None, sampling: Sampling) -> Tensor:
    """See `mamba_core.sampling`."""
    return _filtered(_adjusted(logits, context, sampling), sampling)


def _adjusted(logits: Tensor, context: Context | None, sampling: Sampling) -> Tensor:
    """Logits (b, v) after the bias, the penalties and the processors."""
    if context is None:
        return logits
    if context.bias is not None:
        logits = logits + context.bias
    generated = context.counts > 0
    if sampling.repetition_penalty != 1.0:
        penalised = torch.where(logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty)
        logits = torch.where(context.prompt | generated, penalised, logits)
    if sampling.frequency_penalty:
        logits = logits - sampling.frequency_penalty * context.counts
    if sampling.presence_penalty:
        logits = logits - sampling.presence_penalty * generated
    return sampling.processed(logits, context)


def _filtered(logits: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities (b, v), zero where top_k, top_p or min_p rejects the token."""
    probabilities = ((logits - logits.amax(-1, keepdim=True)) / sampling.temperature).softmax(-1)
    if not sampling.filters:
        return probabilities
    ranked, order = probabilities.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(ranked.shape[-1], device=ranked.device)
    if sampling.top_k:
        ranked = torch.where(rank < sampling.top_k, ranked, 0.0)
    if sampling.top_p < 1.0:
        before = ranked.cumsum(-1) - ranked
        ranked = torch.where((before < sampling.top_p * ranked.sum(-1, keepdim=True)) | (rank == 0), ranked, 0.0)
    ranked = torch.where(ranked >= sampling.min_p * ranked[:, :1], ranked, 0.0)
    return torch.zeros_like(probabilities).scatter(-1, order, ranked)


def _updated(context: Context | None, tokens: Tensor) -> Context | None:
    """The context after these tokens."""
    if context is None:
        return None
    counts = context.counts.scatter_add(1, tokens[:, None], torch.ones_like(context.counts[:, :1]))
    return context._replace(last=tokens, counts=counts, step=context.step + 1)


def _uniforms(model, draw) -> Iterator[Tensor | None]:
    """(b,) for each step, or None if sampling draws nothing."""
    for start in count(0, BLOCK):
        yield from [None] * BLOCK if draw is None else from_numpy(draw(start, BLOCK), device=model.device)


def _on_host(choice: Choice) -> Choice:
    return tree_map(lambda value: None if value is None else value.cpu().numpy(), choice)
