"""A model's forward pass and its gradients by the framework's own means, compiled where one would compile them.

Used by benchmarks that run on other commits too: it imports nothing of the package.
"""

from collections.abc import Callable


def forward(model) -> Callable:
    """A function (inputs, state=None, mask=None, segment_ids=None) -> (logits or hidden, state), without gradients."""
    return {"torch": _torch_forward, "mlx": _mlx_forward, "jax": _jax_forward}[model.backend](model)


def gradients(model) -> Callable:
    """A function (inputs, dy, mask=None, segment_ids=None) -> [gradient of each parameter], in any order.

    The gradients are those of the sum of hidden * dy; the model is of task "features" or "layers".
    """
    return {"torch": _torch_gradients, "mlx": _mlx_gradients, "jax": _jax_gradients}[model.backend](model)


def _torch_forward(model):
    import torch

    @torch.no_grad()
    def call(inputs, state=None, mask=None, segment_ids=None):
        return tuple(model(inputs, state, mask=mask, segment_ids=segment_ids))

    return call


def _torch_gradients(model):
    import torch

    parameters = list(model.parameters())

    def call(inputs, dy, mask=None, segment_ids=None):
        hidden = model(inputs, mask=mask, segment_ids=segment_ids).hidden
        return list(torch.autograd.grad(hidden, parameters, dy.to(hidden.dtype)))

    return call


def _mlx_forward(model):
    import mlx.core as mx

    def call(inputs, state=None, mask=None, segment_ids=None):
        out = tuple(model(inputs, state, mask=mask, segment_ids=segment_ids))
        mx.eval(out)
        return out

    return call


def _mlx_gradients(model):
    import mlx.core as mx
    from mlx import nn
    from mlx.utils import tree_flatten

    def product(model, inputs, dy, mask, segment_ids):
        return (model(inputs, mask=mask, segment_ids=segment_ids).hidden * dy).sum()

    differentiated = nn.value_and_grad(model, product)

    def call(inputs, dy, mask=None, segment_ids=None):
        _, found = differentiated(model, inputs, dy, mask, segment_ids)
        mx.eval(found)
        return [gradient for _, gradient in tree_flatten(found)]

    return call


def _jax_forward(model):
    import jax
    from flax import nnx

    @nnx.jit
    def compiled(model, inputs, state, mask, segment_ids):
        return tuple(model(inputs, state, mask=mask, segment_ids=segment_ids))

    def call(inputs, state=None, mask=None, segment_ids=None):
        return jax.block_until_ready(compiled(model, inputs, state, mask, segment_ids))

    return call


def _jax_gradients(model):
    import jax
    from flax import nnx

    @nnx.jit
    @nnx.grad
    def compiled(model, inputs, dy, mask, segment_ids):
        return (model(inputs, mask=mask, segment_ids=segment_ids).hidden * dy).sum()

    def call(inputs, dy, mask=None, segment_ids=None):
        return jax.tree.leaves(jax.block_until_ready(compiled(model, inputs, dy, mask, segment_ids)))

    return call
