"""An operator and the operator of its gradient as one function that autograd, the compiler and torch.func all take."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

REVERSE_ONLY = (
    'the kernels but "sequential" have first derivatives in reverse mode only: no second derivative and no jvp; '
    'for them pass kernel="sequential", to a model kernels="sequential"'
)


def differentiable(scan, scan_backward) -> Callable[..., tuple[Tensor, Tensor]]:
    """scan(*inputs) of two custom operators, with its first gradient in reverse mode.

    scan(*inputs): (y, final state, boundaries), boundaries being what only the gradient needs.
    scan_backward(dy, dfinal_state or None, boundaries, *inputs): of every floating-point tensor among the inputs, in
    their order, its gradient. Inputs are tensors, None and options.
    """

    class Gradient(Function):
        """`scan_backward`, which itself is not differentiated."""

        generate_vmap_rule = True

        @staticmethod
        def forward(*arguments):
            return tuple(scan_backward(*arguments))

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, *_):
            raise NotImplementedError(REVERSE_ONLY)

        jvp = backward

    class Scan(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*inputs):
            return scan(*inputs)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.options = [None if isinstance(value, Tensor) else value for value in inputs]
            ctx.save_for_backward(output[2], *(value if isinstance(value, Tensor) else None for value in inputs))
            ctx.set_materialize_grads(False)

        @staticmethod
        def backward(ctx, dy, dfinal_state, _):
            boundaries, *tensors = ctx.saved_tensors
            inputs = [option if value is None else value for value, option in zip(tensors, ctx.options, strict=True)]
            dy = torch.zeros_like(inputs[0]) if dy is None else dy
            gradients = iter(Gradient.apply(dy, dfinal_state, boundaries, *inputs))
            return tuple(next(gradients) if is_float(value) else None for value in inputs)

        @staticmethod
        def jvp(ctx, *_):
            raise NotImplementedError(REVERSE_ONLY)

    scan.register_autograd(Scan.backward, setup_context=Scan.setup_context)
    for operator in (scan, scan_backward):
        operator.register_vmap(one_at_a_time(operator))

    def run(*inputs):
        refuse_tangents(*inputs)
        # A compiled or exported graph keeps the operator, with the gradient registered for it; torch.func wants the
        # Function.
        y, final_state, _ = (scan if torch.compiler.is_compiling() else Scan.apply)(*inputs)
        return y, final_state

    return run


def is_float(value) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def refuse_tangents(*values) -> None:
    """Forward mode would lose them without a word: it knows no rule for an operator.

    An operator asks too: a compiled graph may be given tangents when it runs.
    """
    if any(isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None for value in values):
        raise NotImplementedError(REVERSE_ONLY)


def one_at_a_time(operator):
    """A rule for vmap: the operator on each element, one after another, the results stacked."""

    def rule(info, axes, *arguments):
        pairs = list(zip(arguments, axes, strict=True))
        if info.batch_size == 0:
            raise ValueError("vmap over an axis of length 0; expected at least one element")

        def part(value, axis, index):
            if isinstance(value, list):
                return [part(item, its_axis, index) for item, its_axis in zip(value, axis, strict=True)]
            return value if axis is None else value.select(axis, index)

        def element(index):
            return (part(value, axis, index) for value, axis in pairs)

        results = [operator(*element(index)) for index in range(info.batch_size)]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        stacked = type(results[0])(map(torch.stack, zip(*results, strict=True)))
        return stacked, type(stacked)([0] * len(stacked))

    return rule
