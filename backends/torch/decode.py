"""Decoding: prefill, then one token at a time, sampled on the device."""

from collections.abc import Iterator

import torch
from torch import Tensor

from mamba_core.backend import State
from mamba_core.backends.torch.arrays import from_numpy
from mamba_core.generation import Sampling, uniforms
from mamba_core.observe import unobserved


@torch.inference_mode()
def decode(model, prompts, mask, sampling: Sampling, state: State | None = None) -> Iterator[tuple]:
    """Without gradients; the model is left as it is."""
    prompts, mask = (from_numpy(value, device=model.device) for value in (prompts, mask))
    vocabulary = model.config.vocab_size
    rows = torch.arange(len(prompts), device=prompts.device)
    hidden, state = _prefill(model, prompts, mask, state)
    seen = _seen(prompts, mask, vocabulary)
    step = 0
    while True:
        logits = model.head(hidden)[:, :vocabulary]
        uniform = None if sampling.greedy else from_numpy(uniforms(sampling.seed, step, len(rows)), device=model.device)
        tokens, logprobs = choose(logits, seen, uniform, sampling)
        yield tokens.cpu().numpy(), logprobs.cpu().numpy()
        seen[rows, tokens] = True
        hidden, state = _forward(model, tokens[:, None], None, state)
        hidden, step = hidden[:, 0], step + 1


def choose(logits: Tensor, seen: Tensor, uniform: Tensor | None, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """(tokens (b,), log-probabilities (b,)) from float32 logits (b, v), as `mamba_core.generation` says."""
    logprobs = logits.log_softmax(-1)
    if sampling.repetition_penalty != 1.0:
        penalised = torch.where(logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty)
        logits = torch.where(seen, penalised, logits)
    if sampling.greedy:
        tokens = logits.argmax(-1)
    else:
        probabilities = filtered((logits - logits.amax(-1, keepdim=True)) / sampling.temperature, sampling)
        running = probabilities.cumsum(-1)
        # A sum in parallel may rise by rounding where nothing is added, or stay below u times the total at the end.
        kept = probabilities > 0
        reached = kept & (running > uniform[:, None] * running[:, -1:])
        last = kept.shape[-1] - 1 - kept.flip(-1).int().argmax(-1)
        tokens = torch.where(reached.any(-1), reached.int().argmax(-1), last)
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0]


def filtered(logits: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities (b, v) with those that top_k, top_p and min_p reject at zero."""
    probabilities = logits.softmax(-1)
    if not sampling.filters:
        return probabilities
    ranked, order = probabilities.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(ranked.shape[-1], device=ranked.device)
    keep = rank < sampling.top_k if sampling.top_k else torch.ones_like(rank, dtype=torch.bool)
    ranked = torch.where(keep, ranked, 0.0)
    before = ranked.cumsum(-1) - ranked
    keep = (before < sampling.top_p * ranked.sum(-1, keepdim=True)) | (rank == 0)
    keep = keep & (ranked >= sampling.min_p * ranked[:, :1])
    return torch.zeros_like(probabilities).scatter(-1, order, torch.where(keep, ranked, 0.0))


def _prefill(model, prompts, mask, state) -> tuple[Tensor, State]:
    """The hidden state at each row's last position that counts, and the state after it."""
    state = model.init_state(len(prompts)) if state is None else state
    hidden, state = _forward(model, prompts, None if bool(mask.all()) else mask, state)
    last = mask.sum(1) - 1
    return hidden[torch.arange(len(prompts), device=last.device), last], state


def _forward(model, tokens, mask, state):
    return model.backbone(tokens, state, mask, None, unobserved)


def _seen(prompts, mask, vocabulary) -> Tensor:
    """(b, v) bool: the token stands in the row."""
    seen = torch.zeros(len(prompts), vocabulary + 1, dtype=torch.bool, device=prompts.device)
    seen.scatter_(1, torch.where(mask, prompts, vocabulary).long(), True)
    return seen[:, :vocabulary].clone()
