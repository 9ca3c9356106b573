"""This package's backends as candidates, a kernel each where an op is timed."""

from functools import partial
from itertools import islice

import numpy as np

import mamba_core as mc
from mamba_core import registry
from mamba_core.benchmarks import frameworks
from mamba_core.benchmarks.cases import DECODED, GREEDY, Case, tokens
from mamba_core.benchmarks.frameworks import Timed

OPS = {"torch": frameworks.torch_op, "mlx": frameworks.mlx_op, "jax": frameworks.jax_op}


def candidates(case: Case, names: list[str]) -> dict:
    """Name -> how it is made, for the backends of these names."""
    if case.op is None:
        return {name: partial(WORKS[case.work], name) for name in names}
    kernels = {name: registry.get(name).available_kernels("cpu")[case.op] for name in names}
    return {
        f"{name} {kernel}": partial(_op, name, kernel)
        for name, reasons in kernels.items()
        for kernel, reason in reasons.items()
        if reason is None and kernel not in case.left_out
    }


def _op(name: str, kernel: str, case: Case) -> Timed:
    return OPS[name](partial(getattr(registry.get(name).op(case.op), case.op), kernel=kernel), case)


def _model(name: str, case: Case):
    model = mc.build(case.config, backend=name, dtype=case.dtype, device="cpu")
    model.remat = case.remat
    return model


def _forward(name: str, case: Case) -> Timed:
    model = _model(name, case)
    if name == "torch":
        return frameworks.torch_forward(lambda ids: model(ids).logits, case)
    return {"mlx": frameworks.mlx_forward, "jax": frameworks.jax_forward}[name](model, case)


def _prefill(name: str, case: Case) -> Timed:
    prompts, model, backend = tokens(case), _model(name, case), registry.get(name)
    mask = np.ones(prompts.shape, bool)
    # To NumPy, because JAX hands out logits before they are computed.
    return Timed(lambda: [backend.to_numpy(backend.prefill(model, prompts, mask).logits)], lambda logits: logits)


def _decode(name: str, case: Case) -> Timed:
    prompts, model, backend = tokens(case), _model(name, case), registry.get(name)
    prefilled = backend.prefill(model, prompts, np.ones(prompts.shape, bool))
    decoding = iter(backend.decode(model, prefilled, GREEDY))
    return Timed(
        lambda: list(islice(decoding, DECODED)), lambda choices: [np.stack([choice.logprobs for choice in choices])]
    )


def _block(name: str, case: Case) -> Timed:
    model = _model(name, case)
    if name == "torch":
        return frameworks.torch_block(lambda x: model(x).hidden, model.parameters(), case)
    return {"mlx": frameworks.mlx_block, "jax": frameworks.jax_block}[name](model, case)


def _training(name: str, case: Case) -> Timed:
    model, given = _model(name, case), tokens(case, more=1)

    def arrays(result):
        loss, gradients = result
        return [np.array(loss), *(gradients[parameter] for parameter in sorted(gradients))]

    return Timed(lambda: registry.get(name).loss_and_gradients(model, given), arrays)


WORKS = {"forward": _forward, "prefill": _prefill, "decode": _decode, "block": _block, "training": _training}
