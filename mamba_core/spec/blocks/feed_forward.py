"""What may follow a block's mixer: SwiGLU, or a mixture of experts that each are one."""

from collections.abc import Iterator
from typing import NamedTuple

from mamba_core.spec.graph import Node
from mamba_core.spec.init import Init, ones
from mamba_core.spec.params import Parameter


class FeedForward(NamedTuple):
    """width: of what lies between the two projections. experts: how many there are, 0 for no mixture; top_k: how many
    of them compute a position."""

    width: int
    experts: int = 0
    top_k: int = 0

    @property
    def kind(self) -> str:
        """Its file in `backends/*/mixers`."""
        return "mixture_of_experts" if self.experts else "swiglu"


def parameters(prefix: str, sizes: FeedForward, config, init: Init) -> Iterator[Parameter]:
    """prefix: of the layer, such as "backbone.layers.0.". init: of the projections."""
    d, i, experts = config.d_model, sizes.width, sizes.experts
    own, inner, last = prefix + "feed_forward.", init(d, False), init(i, True)
    halves = (("gate", i), ("up", i))
    yield Parameter(prefix + "norm2.weight", "d", (d,), ones, decay=False)
    if experts:
        yield Parameter(own + "router.weight", "xd", (experts, d), inner, mup_role="output")
        yield Parameter(own + "experts.gate_up_proj", "xed", (experts, 2 * i, d), inner, mup_role="hidden")
        yield Parameter(own + "experts.down_proj", "xde", (experts, d, i), last, mup_role="hidden")
    else:
        yield Parameter(own + "gate_up_proj.weight", "ed", (2 * i, d), inner, mup_role="hidden", parts=halves)
        yield Parameter(own + "down_proj.weight", "de", (d, i), last, mup_role="hidden")


def graph(layer: int, residual: str, sizes: FeedForward, config) -> Iterator[Node]:
    """The nodes from the second norm to the sum with the residual stream."""
    here, weights = f"layers.{layer}.", f"backbone.layers.{layer}."
    own = weights + "feed_forward."

    def linear(name, source):
        return Node(here + name, "linear", (here + source,), {"weight": f"{own}{name}.weight"})

    eps = {"eps": config.norm_eps}
    yield Node(here + "norm2", "rms_norm", (residual,), {"weight": weights + "norm2.weight"}, eps)
    if sizes.experts:
        yield linear("router", "norm2")
        joined = {"gate_up": own + "experts.gate_up_proj", "down": own + "experts.down_proj"}
        inputs, last = (here + "norm2", here + "router"), "experts"
        yield Node(here + last, "mixture_of_experts", inputs, joined, {"top_k": sizes.top_k})
    else:
        yield linear("gate_up_proj", "norm2")
        yield Node(here + "active", "swiglu", (here + "gate_up_proj",))
        last = "down_proj"
        yield linear(last, "active")
    yield Node(here + "residual", "add", (residual, here + last))
