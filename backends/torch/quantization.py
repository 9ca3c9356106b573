"""Weights in 8 or 4 bits for decoding: each is a whole number times the scale of its group of columns.

A row is stored as words of 32 bits. It is cut into 32 / bits strips of equal length. A word holds one number of each
strip, the first strip's in its lowest bits, so that a thread that reads adjacent words needs adjacent inputs.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba_core.backends.torch.kernels import triton, triton_linear
from mamba_core.backends.torch.kernels.triton_linear import Packed
from mamba_core.backends.torch.untouched import untouched
from mamba_core.backends.torch.ways import own
from mamba_core.wrappers import unwrap

GROUP = 32
# The large linear layers of every mixer.
MIXER = ("in_proj", "out_proj")


def quantize(model: nn.Module, bits: int = 8) -> nn.Module:
    """A model for inference with the large linear layers and the head in 8 or 4 bits. The rest is shared with `model`.

    Those are in_proj and out_proj of mixers, and what the class of a feed-forward lists as `quantized`. Routers and the
    experts of mixtures stay as they are.

    On a GPU, few rows are multiplied by the stored numbers directly. Otherwise the weights are unpacked first, so a
    prompt costs more than without quantisation. The quantised model cannot be saved or trained.

    Raises:
        ValueError: bits is neither 8 nor 4, or a weight's columns are no multiple of a group in each strip.
        TypeError: one of those layers, or the head, is no `torch.nn.Linear` as built, but was replaced, patched or
            hooked; of a tied head, the embedding. Or the class of a feed-forward lists none.
    """
    if bits not in (8, 4):
        raise ValueError(f"bits is {bits!r}; expected 8 or 4")
    model = unwrap(model, "quantising")
    head = None
    if hasattr(model, "lm_head"):
        kind, source = (nn.Embedding, model.inner.embeddings) if model.lm_head is None else (nn.Linear, model.lm_head)
        _check_built(kind, source, "the head")
        head = source
    # Parameters are shared, not copied.
    quantized = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    for index, block in enumerate(quantized.inner.layers):
        if not hasattr(getattr(block, "mixer", None), "in_proj"):
            raise TypeError(f"layer {index} was replaced or wrapped; expected a block whose mixer has in_proj")
        parts = [(block.mixer, MIXER)]
        if block.feed_forward is not None:
            parts.append((block.feed_forward, _quantized(block.feed_forward, index)))
        for part, names in parts:
            for name in names:
                linear = getattr(part, name, None)
                _check_built(nn.Linear, linear, f"{name} of layer {index}")
                setattr(part, name, QuantizedLinear(linear.weight, linear.bias, bits))
    if head is not None:
        quantized.lm_head = QuantizedLinear(head.weight, getattr(head, "bias", None), bits)
    quantized.inner.record()
    return quantized


def _quantized(feed_forward: nn.Module, index: int) -> tuple[str, ...]:
    """The linear layers of a feed-forward that are quantised."""
    if (names := own(feed_forward, "quantized")) is None:
        kind = f"{type(feed_forward).__module__}.{type(feed_forward).__qualname__}"
        raise TypeError(
            f"the feed-forward of layer {index} is {kind}; expected one whose class lists `quantized` layers"
        )
    return names


def _check_built(kind: type, layer: nn.Module | None, name: str) -> None:
    if type(layer) is not kind:
        found = f"{type(layer).__module__}.{type(layer).__qualname__}"
        raise TypeError(f"{name} is {found}; expected torch.nn.{kind.__name__}")
    if not untouched(kind, layer):
        raise TypeError(f"{name} is patched or has hooks, which its quantised form would not have; remove them first")


class QuantizedLinear(nn.Module):
    """`torch.nn.Linear` with a weight (n, k) in few bits, which has no gradient."""

    def __init__(self, weight: Tensor, bias: Tensor | None, bits: int):
        super().__init__()
        words, scales = pack(weight.detach(), bits)
        self.bits, self.dtype = bits, weight.dtype
        self.register_buffer("words", words)
        self.register_buffer("scales", scales)
        self.bias = bias

    @property
    def packed(self) -> Packed:
        return Packed(self.words, self.scales, self.bits, GROUP)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // max(1, x.shape[-1])
        plain = torch.is_grad_enabled() or not 0 < rows <= triton_linear.MOST_ROWS
        if plain or triton.reason(x.device, x.dtype) is not None:
            return F.linear(x, unpack(self.packed, x.dtype), self.bias)
        return triton_linear.linear(x.reshape(rows, -1), self.packed, self.bias).view(*x.shape[:-1], -1)

    def extra_repr(self) -> str:
        return f"{self.words.shape[1] * 32 // self.bits}, {len(self.words)}, bits={self.bits}"


def stored_weight(linear: nn.Module) -> Tensor | Packed:
    """The weight of a linear layer as it lies in memory."""
    return linear.packed if type(linear) is QuantizedLinear else linear.weight


def pack(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The words and the scales of a weight (n, k): see `Packed`.

    The scale maps the number of the largest size to the least whole number, -2^(bits-1), which has no opposite.
    """
    (n, columns), strips = weight.shape, 32 // bits
    if columns % (strips * GROUP):
        raise ValueError(f"a weight has {columns} columns; expected a multiple of {strips * GROUP} for {bits} bits")
    groups = weight.float().view(n, -1, GROUP)
    largest = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    least = -(1 << (bits - 1))
    scales = (largest / least).to(torch.bfloat16 if weight.dtype == torch.bfloat16 else torch.float16)
    whole = torch.where(scales == 0, 0.0, groups / scales.float()).round().clamp(least, -least - 1)
    raised = (whole.long() - least).view(n, strips, columns // strips)
    words = sum(raised[:, strip] << (bits * strip) for strip in range(strips))
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32), scales[..., 0].contiguous()


def unpack(packed: Packed, dtype: torch.dtype) -> Tensor:
    """The stored weight (n, k)."""
    words, scales, bits, group = packed
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    whole = ((words[:, None] >> shifts[:, None]) & ((1 << bits) - 1)) - (1 << (bits - 1))
    return (whole.view(len(words), -1, group) * scales.float()[..., None]).to(dtype).view(len(words), -1)
