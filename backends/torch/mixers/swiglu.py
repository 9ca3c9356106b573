"""A feed-forward with a gate: down(silu(gate) * up)."""

from torch import Tensor, nn

from mamba_core.backends.torch.kernels.triton_feed_forward_step import FeedForward
from mamba_core.backends.torch.mixers import s6
from mamba_core.backends.torch.ops import swiglu
from mamba_core.backends.torch.quantization import stored_weight
from mamba_core.call import Call


class SwiGLU(nn.Module):
    """Its width is that of `config.feed_forward(layer)`."""

    quantized = ("gate_up_proj", "down_proj")

    def __init__(self, config, layer: int, options):
        super().__init__()
        d, i = config.d_model, config.feed_forward(layer).width
        self.kernels, self.projected = options.kernels, 2 * i
        self.gate_up_proj = nn.Linear(d, 2 * i, bias=False)
        self.down_proj = nn.Linear(i, d, bias=False)

    def forward(self, hidden: Tensor, call: Call) -> Tensor:
        projected = call.observe("gate_up_proj", s6.project(self, "gate_up_proj", hidden))
        active = call.observe("active", swiglu.swiglu(projected, self.kernels.of("swiglu")))
        return call.observe("down_proj", s6.project(self, "down_proj", active))

    def cuda_step(self, norm: nn.Module) -> FeedForward | str:
        """For the way cuda_step, with the norm before it, or why it cannot compute it."""
        if not (s6.is_ours(self.gate_up_proj) and s6.is_ours(self.down_proj)):
            return "a layer of the feed-forward was changed"
        if self.gate_up_proj.bias is not None or self.down_proj.bias is not None:
            return "a layer of the feed-forward was given a bias"
        return FeedForward(norm.weight, norm.eps, stored_weight(self.gate_up_proj), stored_weight(self.down_proj))

    def captures(self) -> bool:
        """As `s6.captures`."""
        return True

    def width(self) -> int | None:
        """As `s6.width`."""
        return self.projected if s6.is_ours(self.gate_up_proj) and s6.is_ours(self.down_proj) else None


Mixer = SwiGLU
