"""A feed-forward of experts, each a SwiGLU, of which a router chooses some for each position (Fedus et al. 2021)."""

import warnings

import mlx.core as mx
import mlx.nn as nn

from mamba_core.backends.mlx import layers
from mamba_core.backends.mlx.mixers import Options, s6
from mamba_core.backends.mlx.ops.mixture_of_experts import mix
from mamba_core.backends.mlx.untouched import untouched
from mamba_core.call import Call


class Experts(nn.Module):
    """The weights of all experts, stacked: gate_up_proj (experts, 2 i, d) and down_proj (experts, d, i)."""

    def __init__(self, experts: int, width: int, d_model: int, top_k: int, name: str, options: Options):
        super().__init__()
        self.top_k = top_k
        self.name = name
        self.kernel = options.kernels.of("mixture_of_experts")
        self.gate_up_proj = mx.zeros((experts, 2 * width, d_model))
        self.down_proj = mx.zeros((experts, d_model, width))

    def __call__(self, hidden: mx.array, logits: mx.array, call: Call) -> mx.array:
        """hidden (b, l, d), the router's logits (b, l, experts) -> (b, l, d)."""
        return mix(call, hidden, logits, self.gate_up_proj, self.down_proj, top_k=self.top_k, kernel=self.kernel)

    def to_quantized(self, *_, **__) -> "Experts":
        """Itself, with a warning: `nn.quantize` asks every module that has this."""
        warnings.warn(f"{self.name} stays as it is: experts are not quantised, linear layers alone are", stacklevel=3)
        return self


class MixtureOfExperts(nn.Module):
    def __init__(self, config, layer: int, options: Options):
        super().__init__()
        sizes = config.feed_forward(layer)
        name = f"backbone.layers.{layer}.feed_forward.experts"
        self.kernels = options.kernels
        self.router = nn.Linear(config.d_model, sizes.experts, bias=False)
        self.experts = Experts(sizes.experts, sizes.width, config.d_model, sizes.top_k, name, options)

    def __call__(self, hidden: mx.array, call: Call) -> mx.array:
        """hidden (b, l, d) -> (b, l, d). Where `call.routers` is a list, the router's logits join it."""
        logits = call.observe("router", layers.linear(self.router, hidden, self.kernels.of("linear")))
        if call.routers is not None:
            call.routers.append(logits)
        return call.observe("experts", self.experts(hidden, logits, call))

    def width(self) -> int | None:
        """Elements of its widest array for each position; None if a part was replaced."""
        if not (any(untouched(kind, self.router) for kind in s6.LINEAR) and untouched(Experts, self.experts)):
            return None
        return self.experts.top_k * self.experts.gate_up_proj.shape[1]


Mixer = MixtureOfExperts
