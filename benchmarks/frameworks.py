"""One timed call in each framework: everything is computed when it returns, and nothing that it needs is made in it.

Each function returns a `Timed`; a framework is imported when its function is called.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from mamba_core.benchmarks.cases import ARGUMENTS, Case, block_inputs, op_inputs, tokens


class Timed(NamedTuple):
    """call: what is timed. arrays: its result as NumPy, to be compared; None if it computes another function."""

    call: Callable[[], Any]
    arrays: Callable[[Any], list[np.ndarray]] | None


def torch_op(op: Callable, case: Case) -> Timed:
    """op(*arguments) of tensors, those of `cases.ARGUMENTS`, laid out as `mamba_core.backend` has them."""
    import torch

    inputs = {name: torch.from_numpy(value) for name, value in op_inputs(case).items()}
    arguments, dy = [inputs[name] for name in ARGUMENTS[case.op]], inputs["dy"]

    @torch.inference_mode()
    def forward():
        return (op(*arguments),)

    def gradient():
        y = op(*arguments)
        return y, *torch.autograd.grad(y, arguments, dy)

    if not case.differentiated:
        return Timed(forward, torch_arrays)
    for argument in arguments:
        argument.requires_grad_()
    return Timed(gradient, torch_arrays)


def mlx_op(op: Callable, case: Case) -> Timed:
    import mlx.core as mx

    inputs = {name: mx.array(value) for name, value in op_inputs(case).items()}
    arguments, dy = [inputs[name] for name in ARGUMENTS[case.op]], inputs["dy"]

    def forward():
        return _evaluated([op(*arguments)])

    def gradient():
        outputs, gradients = mx.vjp(lambda *values: [op(*values)], arguments, [dy])
        return _evaluated([*outputs, *gradients])

    return Timed(gradient if case.differentiated else forward, mlx_arrays)


def jax_op(op: Callable, case: Case) -> Timed:
    import jax

    inputs = {name: jax.numpy.array(value) for name, value in op_inputs(case).items()}
    arguments, dy = [inputs[name] for name in ARGUMENTS[case.op]], inputs["dy"]

    @jax.jit
    def forward(*arguments):
        return (op(*arguments),)

    @jax.jit
    def gradient(*arguments):
        y, pullback = jax.vjp(op, *arguments)
        return y, *pullback(dy)

    compiled = gradient if case.differentiated else forward
    return Timed(lambda: jax.block_until_ready(compiled(*arguments)), jax_arrays)


def torch_forward(model: Callable, case: Case, *, same: bool = True) -> Timed:
    """model(ids) -> logits. same: whether it computes the reference's function."""
    import torch

    ids = torch.from_numpy(tokens(case)).long()

    @torch.inference_mode()
    def call():
        return (model(ids),)

    return Timed(call, torch_arrays if same else None)


def mlx_forward(model: Callable, case: Case) -> Timed:
    import mlx.core as mx

    ids = mx.array(tokens(case))
    return Timed(lambda: _evaluated([model(ids).logits]), mlx_arrays)


def jax_forward(model: Callable, case: Case) -> Timed:
    import jax
    from flax import nnx

    ids, compiled = jax.numpy.array(tokens(case)), nnx.jit(lambda model, ids: (model(ids).logits,))
    return Timed(lambda: jax.block_until_ready(compiled(model, ids)), jax_arrays)


def torch_block(block: Callable, parameters, case: Case) -> Timed:
    """block: (1, l, d) -> (1, l, d); the gradients of its input and of the parameters are computed."""
    import torch

    x, dy = (torch.from_numpy(value) for value in block_inputs(case))
    inputs = [x.requires_grad_(), *parameters]

    def call():
        hidden = block(x)
        return hidden, *torch.autograd.grad(hidden, inputs, dy)

    return Timed(call, lambda result: torch_arrays(result[:2]))


def mlx_block(model, case: Case) -> Timed:
    import mlx.core as mx

    x, dy = (mx.array(value) for value in block_inputs(case))
    parameters = model.trainable_parameters()

    def loss(parameters, x):
        model.update(parameters)
        hidden = model(x).hidden
        return (hidden * dy).sum(), hidden

    differentiated = mx.value_and_grad(loss, argnums=(0, 1))

    def call():
        (_, hidden), (gradients, dx) = differentiated(parameters, x)
        mx.eval(hidden, dx, gradients)
        return hidden, dx, gradients

    return Timed(call, lambda result: mlx_arrays(result[:2]))


def jax_block(model, case: Case) -> Timed:
    import jax
    from flax import nnx

    x, dy = (jax.numpy.array(value) for value in block_inputs(case))

    def loss(model, x):
        hidden = model(x).hidden
        return (hidden * dy).sum(), hidden

    differentiated = nnx.jit(nnx.value_and_grad(loss, argnums=(0, 1), has_aux=True))

    def call():
        (_, hidden), (gradients, dx) = differentiated(model, x)
        return jax.block_until_ready((hidden, dx, gradients))

    return Timed(call, lambda result: jax_arrays(result[:2]))


def torch_arrays(values) -> list[np.ndarray]:
    return [value.detach().float().numpy() for value in values]


def mlx_arrays(values) -> list[np.ndarray]:
    import mlx.core as mx

    return [np.array(value.astype(mx.float32)) for value in values]


def jax_arrays(values) -> list[np.ndarray]:
    return [np.asarray(value, np.float32) for value in values]


def _evaluated(values):
    import mlx.core as mx

    mx.eval(values)
    return values
