"""A feed-forward that is a mixture of experts, with the router that chooses among them."""

import torch
from torch import Tensor, nn

from mamba_core.backends.torch.kernels import triton_experts_step
from mamba_core.backends.torch.mixers import s6
from mamba_core.backends.torch.ops.mixture_of_experts import mixture_of_experts
from mamba_core.backends.torch.untouched import untouched
from mamba_core.call import Call


class Experts(nn.Module):
    """The experts' weights together: gate_up_proj (experts, 2 i, d), down_proj (experts, d, i)."""

    def __init__(self, d: int, sizes, kernels):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(sizes.experts, 2 * sizes.width, d))
        self.down_proj = nn.Parameter(torch.empty(sizes.experts, d, sizes.width))
        self.top_k, self.kernels = sizes.top_k, kernels

    def forward(self, hidden: Tensor, logits: Tensor, mask: Tensor | None = None) -> Tensor:
        kernel = self.kernels.of("mixture_of_experts")
        return mixture_of_experts(
            hidden, logits, self.gate_up_proj, self.down_proj, top_k=self.top_k, mask=mask, kernel=kernel
        )


class MixtureOfExperts(nn.Module):
    """Its sizes are `config.feed_forward(layer)`."""

    # The experts are no linear layers, and the router decides which are computed.
    quantized = ()

    def __init__(self, config, layer: int, options):
        super().__init__()
        sizes = config.feed_forward(layer)
        self.kernels = options.kernels
        self.router = nn.Linear(config.d_model, sizes.experts, bias=False)
        self.experts = Experts(config.d_model, sizes, options.kernels)

    def forward(self, hidden: Tensor, call: Call) -> Tensor:
        logits = call.observe("router", s6.project(self, "router", hidden))
        if call.routers is not None:
            call.routers.append(logits)
        return call.observe("experts", self.experts(hidden, logits, call.mask))

    def cuda_step(self, norm: nn.Module) -> triton_experts_step.Experts | str:
        """For the way cuda_step, with the norm before it, or why it cannot compute it."""
        if not (untouched(nn.Linear, self.router) and self.router.bias is None and untouched(Experts, self.experts)):
            return "the router or the experts were changed"
        weights = self.router.weight, self.experts.gate_up_proj, self.experts.down_proj
        return triton_experts_step.Experts(norm.weight, norm.eps, *weights, self.experts.top_k)

    def width(self) -> int | None:
        """As `s6.width`."""
        built = untouched(nn.Linear, self.router) and untouched(Experts, self.experts)
        return self.experts.gate_up_proj.shape[1] * self.experts.top_k if built else None


Mixer = MixtureOfExperts
