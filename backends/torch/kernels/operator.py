"""An operator and the operator of its gradient as one function that autograd, the compiler and torch.func all take."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd import Function, forward_ad

from mamba_core.backends.torch.private import in_forward_mode, intercepted, transformed

# Plain tensor classes, without __torch_function__ overrides.
KINDS = (nn.Parameter, Tensor)
REVERSE_ONLY = (
    "all kernels but the plain ones have first derivatives in reverse mode only: no second derivative and no jvp; "
    'for them pass kernel="plain", to a model kernels="plain"'
)


def differentiable(
    operator, gradient_operator, results: int = 2, kept: Sequence[int] = (2,), unread: Sequence[int] = (), function=None
) -> Callable[..., tuple[Tensor, ...]]:
    """The results of operator(*inputs), a custom operator, with the first gradient in reverse mode.

    Args:
        operator: takes tensors, None and options. Returns its results, such as y and the final state, then values that
            only the gradient needs.
        gradient_operator: takes (dy, the other results' gradients or None, *kept values, *inputs). Returns the gradient
            of every floating-point tensor among the inputs, in their order.
        results: how many of the operator's values are results.
        kept: the indices of the operator's values that are passed to its gradient.
        unread: the indices of inputs whose values the gradient does not read; only their shapes are kept.
        function: the Python function inside the operator, called directly where only the results are needed.
    """

    class Gradient(Function):
        """`gradient_operator`, which itself is not differentiated."""

        generate_vmap_rule = True

        @staticmethod
        def forward(*arguments):
            return tuple(gradient_operator(*arguments))

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, *_):
            raise NotImplementedError(REVERSE_ONLY)

        jvp = backward

    class Forward(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*inputs):
            return operator(*inputs)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.options = [None if isinstance(value, Tensor) else value for value in inputs]
            ctx.y = output[0].shape, output[0].dtype
            tensors = [value if isinstance(value, Tensor) else None for value in inputs]
            for index in unread:
                # Its shape and dtype without its memory.
                tensors[index] = (
                    None if tensors[index] is None else tensors[index].new_empty(()).expand_as(tensors[index])
                )
            ctx.save_for_backward(*(output[index] for index in kept), *tensors)
            ctx.set_materialize_grads(False)

        @staticmethod
        def backward(ctx, *arriving):
            dy, *others = arriving[:results]
            # Read once: under checkpoint, reading computes the values.
            saved = ctx.saved_tensors
            saved, tensors = saved[: len(kept)], saved[len(kept) :]
            inputs = [option if value is None else value for value, option in zip(tensors, ctx.options, strict=True)]
            if dy is None:
                shape, dtype = ctx.y
                dy = inputs[0].new_zeros(shape, dtype=dtype)
            # The Function refuses a second gradient and supports vmap, but doubles the host's time.
            plain = not torch.is_grad_enabled() and not transformed()
            gradients = iter((gradient_operator if plain else Gradient.apply)(dy, *others, *saved, *inputs))
            return tuple(next(gradients) if is_float(value) else None for value in inputs)

        @staticmethod
        def jvp(ctx, *_):
            raise NotImplementedError(REVERSE_ONLY)

    operator.register_autograd(Forward.backward, setup_context=Forward.setup_context)
    for each in (operator, gradient_operator):
        each.register_vmap(one_at_a_time(each))

    def run(*inputs):
        if function is not None and only_results(*inputs):
            return function(*inputs)[:results]
        refuse_tangents(*inputs)
        # The operator has a registered gradient, which a compiled or exported graph keeps; torch.func needs the
        # Function.
        return (Forward.apply if transformed() else operator)(*inputs)[:results]

    return run


def only_results(*inputs) -> bool:
    """Whether nothing records this call (no autograd, tracing or transform), so that the raw function can be called.

    The dispatcher takes the host 50 us, and three times as long when the caches are full of arrays.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing() or transformed():
        return False
    if intercepted() or in_forward_mode():
        return False
    return all(value is None or type(value) in (*KINDS, bool, float) for value in inputs)


def is_float(value) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def refuse_tangents(*values) -> None:
    """Raises where a value has a tangent: forward mode has no rule for an operator and would drop it silently.

    An operator calls this too: a compiled graph may be given tangents when it runs.
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
                return [part(item, item_axis, index) for item, item_axis in zip(value, axis, strict=True)]
            return value if axis is None else value.select(axis, index)

        def element(index):
            return (part(value, axis, index) for value, axis in pairs)

        results = [operator(*element(index)) for index in range(info.batch_size)]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        stacked = type(results[0])(map(torch.stack, zip(*results, strict=True)))
        return stacked, type(stacked)([0] * len(stacked))

    return rule
