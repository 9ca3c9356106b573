"""One choice of a token in float64, a row at a time: what a backend's `choose` must be; see `mamba_core.sampling`."""

import numpy as np


def adjusted(logits: np.ndarray, sampling, prompt=(), generated=(), bias=None) -> np.ndarray:
    """Logits (v,) after the bias and the penalties; processors are of a framework's arrays.

    prompt, generated: the tokens of each, a token as often as it stands there.
    """
    logits = np.array(logits, np.float64) + (0.0 if bias is None else bias)
    for token in {*prompt, *generated}:
        positive = logits[token] > 0
        logits[token] *= 1 / sampling.repetition_penalty if positive else sampling.repetition_penalty
    for token in generated:
        logits[token] -= sampling.frequency_penalty
    for token in set(generated):
        logits[token] -= sampling.presence_penalty
    return logits


def distribution(logits: np.ndarray, sampling) -> np.ndarray:
    """Probabilities (v,) of adjusted logits after temperature and filters; their sum is 1."""
    if sampling.temperature == 0:
        return (np.arange(len(logits)) == logits.argmax()).astype(np.float64)
    p = np.exp((logits - logits.max()) / sampling.temperature)
    p /= p.sum()
    order = sorted(range(len(p)), key=lambda token: (-p[token], token))
    order = order[: sampling.top_k or len(order)]
    total, running = sum(p[token] for token in order), 0.0
    nucleus: list[int] = []
    for token in order:
        if nucleus and running >= sampling.top_p * total:
            break
        nucleus.append(token)
        running += p[token]
    kept = np.zeros_like(p)
    for token in nucleus:
        kept[token] = p[token] if p[token] >= sampling.min_p * p[order[0]] else 0.0
    return kept / kept.sum()


def choose(probabilities: np.ndarray, uniform: float) -> int:
    """The first token at which the running sum exceeds `uniform` in [0, 1)."""
    return int((np.cumsum(probabilities) > uniform).argmax())
