"""One position of consecutive blocks, or of a language model, in Triton and in the memory of the states.

A mixer for which there are such kernels has in its own class a function `cuda_step(mixer, norm)`. It returns the layer
of the block, such as `kernels.triton_step.Layer`, or why the kernels cannot compute this mixer. A feed-forward has one
too, which returns such as `kernels.triton_feed_forward_step.FeedForward`.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mamba_core.backend import State
from mamba_core.backends.torch.blocks import Block, RMSNorm
from mamba_core.backends.torch.kernels import triton_norm, triton_product, triton_step
from mamba_core.backends.torch.kernels.operator import KINDS
from mamba_core.backends.torch.ops import block_step
from mamba_core.backends.torch.quantization import QuantizedLinear, stored_weight
from mamba_core.backends.torch.untouched import untouched
from mamba_core.backends.torch.ways import Taken, own
from mamba_core.call import Call

RANK = 20


def take(blocks, residual, states, call) -> Taken | str:
    if not (call.one and call.plain and call.in_place) or call.observed or call.routers is not None:
        return "it computes one position, unobserved and without a gradient, in the memory of its states"
    layers = []
    for block, state in zip(blocks, states, strict=True):
        if type(layer := _layer(block)) is str:
            break
        if not all(value.is_contiguous() for value in state):
            layer = "its states have another layout in memory"
            break
        layers.append(layer)
    if not layers:
        return layer

    def run(residual, pending, states):
        residual = residual if pending is None else residual + pending
        shape, residual, pending = residual.shape, residual[:, 0], None
        counters = triton_product.new_counters(residual.device)
        for layer, state in zip(layers, states, strict=True):
            residual, pending = layer.step(residual, pending, *state, state, counters)
        return residual.view(shape), None if pending is None else pending.view(shape), states

    return Taken(len(layers), run)


def decodes(model) -> bool:
    """Whether decoding takes this way with the model, which it does in the memory of its own states."""
    return torch.device(model.device).type == "cuda" and hasattr(model, "lm_head") and reason(model) is None


def reason(model) -> str | None:
    """Why `logits` cannot compute a position of this language model; None if it can."""
    backbone = model.backbone
    if not model.is_untouched():
        return "the model or its backbone was changed"
    embeddings = backbone.embeddings
    if not (
        untouched(nn.Embedding, embeddings) and embeddings.max_norm is None and untouched(RMSNorm, backbone.norm_f)
    ):
        return "its embedding or its final norm was changed"
    head = model.lm_head
    if head is not None and not (untouched(_linear_kind(head), head) and head.bias is None):
        return "its head was changed"
    for block in backbone.layers:
        if type(layer := _layer(block)) is str:
            return layer
    weight = backbone.embeddings.weight
    if type(model.lm_head) is nn.Linear and model.lm_head.weight.dtype != weight.dtype:
        return "its parameters have several dtypes"
    norms = [norm for block in backbone.layers for norm in (block.norm, block.norm2) if norm is not None]
    if any(norm.weight.dtype != weight.dtype for norm in norms):
        return "its parameters have several dtypes"
    # The kernels read them as they lie in memory.
    if not all(type(value) in KINDS and value.is_contiguous() for value in model.parameters()):
        return "its parameters have another class or layout in memory"
    return triton_norm.reason(weight.device, weight.dtype, weight.shape[1])


def logits(model, tokens: Tensor, state: State) -> Tensor:
    """(b, v) float32 after tokens (b,), in the memory of the state. For `reason(model)` None, and without gradients."""
    backbone, norm = model.backbone, model.backbone.norm_f
    weight = backbone.embeddings.weight
    residual = triton_step.embed(
        tokens.contiguous(), weight, torch.float32 if backbone.residual_in_fp32 else backbone.dtype
    )
    step = take(list(backbone.layers), residual[:, None], state.layers, Call(one=True, in_place=True))
    residual, pending, _ = step.run(residual[:, None], None, state.layers)
    pending = None if pending is None else pending[:, 0]
    head = weight if model.lm_head is None else stored_weight(model.lm_head)
    return triton_step.normed_linear(residual[:, 0], pending, norm.weight, norm.eps, head)


class _Both(NamedTuple):
    """A layer and the feed-forward after it."""

    layer: Any
    feed_forward: Any

    def step(self, residual, pending, *states_and_counters):
        residual, pending = self.layer.step(residual, pending, *states_and_counters)
        return self.feed_forward.step(residual, pending, states_and_counters[-1])


def _layer(block):
    """The layer whose `step` computes the block, or why none does."""
    if not untouched(Block, block):
        return "the block was changed"
    layer = _part(block.mixer, block.norm)
    if type(layer) is str or block.feed_forward is None:
        return layer
    feed_forward = _part(block.feed_forward, block.norm2)
    return feed_forward if type(feed_forward) is str else _Both(layer, feed_forward)


def _part(mixer, norm):
    """What computes a mixer or a feed-forward with the norm before it, or why nothing does."""
    if (read := own(mixer, "cuda_step")) is None:
        return f"{type(mixer).__name__} was not written for it"
    if not (untouched(type(mixer), mixer) and untouched(RMSNorm, norm)):
        return "a norm, a mixer or a feed-forward was changed"
    asked = mixer.kernels.of("block_step")
    if asked not in ("auto", "cuda"):
        return f"kernels has {asked!r} for block_step"
    if type(layer := read(mixer, norm)) is str:
        return layer
    if (why := triton_norm.reason(norm.weight.device, norm.weight.dtype, len(norm.weight))) is not None:
        return why
    if not block_step.takes_cuda(asked, norm.weight.device):
        return "its kernels fail their self-test here"
    dense = [value for value in layer.matrices if type(value) in KINDS]
    if any(value.dtype != norm.weight.dtype or not value.is_contiguous() for value in dense):
        return "its parameters have another dtype or layout in memory"
    return layer


def _linear_kind(linear) -> type:
    return QuantizedLinear if type(linear) is QuantizedLinear else nn.Linear
