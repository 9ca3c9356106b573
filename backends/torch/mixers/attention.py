"""Attention of grouped heads, where asked for after a short convolution of queries, keys and values."""

from torch import Tensor, nn

from mamba_core.backends.torch import layers
from mamba_core.backends.torch.mixers import s6
from mamba_core.backends.torch.ops import attention
from mamba_core.backends.torch.untouched import untouched
from mamba_core.call import Call
from mamba_core.spec.ops.attention import KeyValueCache


class AttentionMixer(nn.Module):
    """Its sizes are `config.attention(layer)`, a `spec.blocks.attention.Attention`."""

    def __init__(self, config, layer: int, options):
        super().__init__()
        self.sizes = sizes = config.attention(layer)
        d, projected = config.d_model, sizes.projected
        self.kernels = options.kernels
        self.in_proj = nn.Linear(d, projected, bias=sizes.bias)
        self.conv1d = None
        if sizes.d_conv:
            self.conv1d = nn.Conv1d(projected, projected, sizes.d_conv, groups=projected, padding=sizes.d_conv - 1)
        self.out_proj = nn.Linear(sizes.heads * sizes.head_dim, d, bias=sizes.out_bias)

    def forward(self, hidden: Tensor, state, call: Call) -> tuple[Tensor, tuple]:
        qkv, sizes = call.observe("in_proj", s6.project(self, "in_proj", hidden)), self.sizes
        if self.conv1d is not None:
            kernel = self.kernels.of("causal_conv")
            qkv, conv = layers.convolution(self.conv1d, qkv, state.conv, call, kernel, activation=None)
            call.observe("conv", qkv)
            state = state._replace(conv=conv)
        parts = qkv.split([size for _, size in sizes.parts], dim=-1)
        named = {name: call.observe(name, part) for (name, _), part in zip(sizes.parts, parts, strict=True)}
        cache = KeyValueCache(state.keys, state.values, state.filled)
        heads = (value.unflatten(-1, (-1, sizes.head_dim)) for value in named.values())
        how = {"scale": sizes.scale, "rotary": sizes.rotary, "kernel": self.kernels.of("attention")}
        y, cache = attention.attend(call, *heads, cache, **how)
        y = call.observe("attention", y.flatten(-2))
        return call.observe("out_proj", s6.project(self, "out_proj", y)), state._replace(**cache._asdict())

    def width(self) -> int | None:
        """As `s6.width`."""
        built = s6.is_ours(self.in_proj) and s6.is_ours(self.out_proj)
        if self.conv1d is not None:
            built = built and layers.is_convolution(self.conv1d)
        return self.sizes.projected if built and untouched(AttentionMixer, self) else None


Mixer = AttentionMixer
