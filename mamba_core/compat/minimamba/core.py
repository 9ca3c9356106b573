"""MiniMamba's parts: the encoder and its blocks, with a mixer class of the user's where one is given."""

from typing import Any

from torch import Tensor, nn

from mamba_core.backends.torch import blocks
from mamba_core.compat.minimamba.config import STATE, BaseMambaConfig, cache_info, ours, store_of
from mamba_core.compat.wrapped import Wrapped, detached, seeded
from mamba_core.weights.tables.mamba import scheme


def run(core: nn.Module, inference_params: Any, inputs: Tensor | None = None, **given: Any):
    """The output of a model of ours, from the state in inference_params on, which then holds the one after it.

    A batch of another size than that state's begins anew, as in MiniMamba.

    Raises:
        ValueError: several positions are given with a seqlen_offset, of which MiniMamba would read the last alone.
    """
    if inference_params is None:
        return core(inputs, **given)
    store, (values,) = store_of(inference_params), [inputs] if inputs is not None else given.values()
    if inference_params.seqlen_offset > 0 and values.shape[1] > 1:
        raise ValueError(
            f"{values.shape[1]} positions are given with seqlen_offset={inference_params.seqlen_offset}, of which "
            "MiniMamba reads the last alone; give only what is new, or call reset_cache"
        )
    held, state = store.get(STATE, (core, None))
    if held is not core:
        raise ValueError("inference_params holds the state of another model; call reset_cache")
    if state is not None and len(state.segment) != len(values):
        state = None
    output = core(inputs, state, **given)
    store[STATE] = core, detached(output.state)
    return output


class CachedModule(nn.Module):
    """What MiniMamba's models say of their cache."""

    def reset_cache(self, inference_params: Any = None) -> None:
        if inference_params is not None:
            store_of(inference_params).clear()
            inference_params.seqlen_offset = 0

    def get_cache_info(self, inference_params: Any = None) -> dict[str, Any]:
        """cached_layers, total_tensors, memory_mb (MiB) and seqlen_offset; see `mamba_core.state_info`."""
        return cache_info(inference_params)


class RMSNorm(blocks.RMSNorm):
    def __init__(self, d_model: int, eps: float = 1e-5):
        super().__init__(d_model, eps)
        nn.init.ones_(self.weight)


class MambaBlock(nn.Module):
    """hidden states + mixer(norm(hidden states)), of a mixer class of the user's."""

    def __init__(self, config: BaseMambaConfig, mixer_cls: type[nn.Module] | None = None):
        super().__init__()
        if mixer_cls is None:
            raise ValueError("MambaBlock needs a mixer_cls here; MambaEncoder without one has MiniMamba's own blocks")
        ours(config, task="layers", vocab_size=1)  # refuses what it cannot be
        self.config, self.norm = config, RMSNorm(config.d_model, config.norm_epsilon)
        self.mixer = mixer_cls(config=config)

    def forward(self, hidden_states: Tensor, inference_params: Any = None) -> Tensor:
        return hidden_states + self.mixer(self.norm(hidden_states), inference_params)


class MambaEncoder(Wrapped, CachedModule):
    """Blocks and a final norm: (b, l, d) to (b, l, d).

    mixer_cls: a class of the user's for the mixers. It is called as mixer_cls(config=config), an instance as
    mixer(hidden_states, inference_params), and it has its place in the stack as layer_idx. Its cache is its own, and
    what `get_cache_info` says of it is nothing.
    """

    def __init__(self, config: BaseMambaConfig, mixer_cls: type[nn.Module] | None = None):
        if mixer_cls is None:
            core = seeded(ours(config, task="layers", vocab_size=1))
            super().__init__(core, "minimamba", scheme("layers", "layers"))
        else:
            nn.Module.__init__(self)
            self.core = None
            self.layers = nn.ModuleList(MambaBlock(config, mixer_cls) for _ in range(config.n_layer))
            for index, layer in enumerate(self.layers):
                mixer: Any = layer.mixer
                mixer.layer_idx = index
        self.config, self.norm = config, RMSNorm(config.d_model, config.norm_epsilon)

    def forward(self, hidden_states: Tensor, inference_params: Any = None) -> Tensor:
        if self.core is not None:
            return self.norm(run(self.core, inference_params, inputs_embeds=hidden_states).hidden)
        for layer in self.layers:
            hidden_states = layer(hidden_states, inference_params)
        return self.norm(hidden_states)
