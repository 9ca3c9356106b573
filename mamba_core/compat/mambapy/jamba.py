"""mambapy.jamba over ours."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from mamba_core import factory
from mamba_core.compat.mambapy.lm import LanguageModel
from mamba_core.compat.mambapy.mamba import Core, MambaConfig, RMSNorm, ours, put_back, state_of
from mamba_core.compat.wrapped import Wrapped, refuse, seeded

__all__ = ["Jamba", "JambaLM", "JambaLMConfig", "MambaConfig", "RMSNorm", "from_pretrained", "load_balancing_loss"]


@dataclass
class JambaLMConfig:
    """mambapy's fields and defaults."""

    d_model: int
    n_layers: int
    mlp_size: int
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    d_state: int = 16
    expand_factor: int = 2
    d_conv: int = 4
    dt_rank: int | str = "auto"
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_init: str = "random"
    dt_scale: float = 1.0
    dt_init_floor: ClassVar[float] = 1e-4
    bias: bool = False
    conv_bias: bool = True
    inner_layernorms: bool = True
    use_cuda: bool = False
    pscan: bool = True
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    attention_dropout: float = 0.0
    num_experts: int = 16
    num_experts_per_tok: int = 2
    attn_layer_offset: int = 4
    attn_layer_period: int = 8
    expert_layer_offset: int = 1
    expert_layer_period: int = 2
    vocab_size: int = 65536
    pad_token_id: int = 0
    tie_lm_weights: bool = True

    architecture: ClassVar[str] = "jamba"

    def __post_init__(self) -> None:
        self.d_inner = self.expand_factor * self.d_model
        if self.dt_rank == "auto":
            self.dt_rank = math.ceil(self.d_model / 16)

    def fields(self) -> dict[str, Any]:
        found = dataclasses.asdict(self)
        if found.pop("attention_dropout"):
            raise ValueError(f"attention_dropout is {self.attention_dropout}; ours has none, expected 0")
        # Beyond those that there are, as in mambapy, a layer of one expert takes one.
        return found | {"num_experts_per_tok": min(self.num_experts_per_tok, self.num_experts)}


class LayerCache(NamedTuple):
    """A layer of a `Jamba`, which knows its empty cache."""

    core: Any
    layer: int

    def get_empty_cache(self, batch_size: int, device=None) -> tuple:
        begun = self.core.init_state(batch_size).layers[self.layer]
        return (None, begun.conv.mT.to(device)) if "ssm" in begun._fields else (None, None)


def _layers(core: Any) -> list[LayerCache]:
    return [LayerCache(core, index) for index in range(core.config.n_layer)]


def _routed(core: Any, *inputs: Tensor, **given: Tensor) -> tuple[Any, list[Tensor]]:
    """The output, and a router's logits (rows, experts) for each layer: ones (rows, 1) where it has none."""
    rows = math.prod((*inputs, *given.values())[0].shape[:2])
    found: dict[str, Tensor] = {}
    if core.config.num_experts == 1:
        output = core(*inputs, **given)
    else:
        output = core(*inputs, **given, observe=lambda name, value: found.__setitem__(name, value))
    ones = torch.ones(rows, 1, device=core.device)
    named = (f"layers.{layer}.router" for layer in range(core.config.n_layer))
    return output, [found[name].flatten(0, 1) if name in found else ones for name in named]


class Jamba(Core):
    """The blocks alone: (b, l, d) to (b, l, d) and the routers' logits, a tensor (b l, experts) a layer."""

    @property
    def layers(self) -> list[LayerCache]:
        return _layers(self.core)

    def forward(self, x: Tensor):
        output, routers = _routed(self.core, inputs_embeds=x)
        return output.hidden, routers

    def step(self, x: Tensor, caches: list) -> tuple[Tensor, list]:
        """x (b, l, d), and a cache a layer: (h, inputs) of Mamba, (keys, values) (b, heads, l, p) of attention."""
        output = self.core(state=state_of(self.core, caches, len(x)), inputs_embeds=x)
        put_back(output.state, caches)
        return output.hidden, caches


class JambaLM(LanguageModel):
    """Logits (b, l, v) of ids (b, l), and with several experts the routers' logits too. The row of the padding's id is
    not trained."""

    def __init__(self, config: JambaLMConfig):
        super().__init__(seeded(ours(config, task="lm")), "mambapy")
        self.core.backbone.embeddings.padding_idx = config.pad_token_id
        self.config, self.padding_idx, self.vocab_size = config, config.pad_token_id, config.vocab_size

    @property
    def layers(self) -> list[LayerCache]:
        return _layers(self.core)

    def forward(self, tokens: Tensor):
        output, routers = _routed(self.core, tokens)
        return output.logits if self.core.config.num_experts == 1 else (output.logits, routers)

    def step(self, tokens: Tensor, caches: list) -> tuple[Tensor, list]:
        """tokens (b, l) to logits (b, l, v)."""
        output = self.core(tokens, state_of(self.core, caches, len(tokens)))
        put_back(output.state, caches)
        return output.logits, caches

    def generate(
        self,
        tokenizer,
        prompt: str,
        max_tokens: int = 50,
        batch_size: int = 1,
        sample: bool = True,
        top_k: int | None = 40,
        temperature: float = 1.0,
    ):
        """The prompt and what follows as text, special tokens left out; a list where batch_size is more than 1."""
        rows = self._continued(tokenizer, prompt, max_tokens, batch_size, sample, top_k, temperature)
        texts = [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
        return texts[0] if batch_size == 1 else texts


def load_balancing_loss(router_logits: list[Tensor], num_experts: int, num_experts_per_tok: int) -> Tensor:
    """That of transformers, over the layers that have a mixture; see `router_aux_loss_coef` of `JambaConfig`."""
    from mamba_core.backends.torch.losses import balance_loss

    mixtures = [logits[None] for logits in router_logits if logits.shape[1] == num_experts]
    return balance_loss(mixtures, num_experts_per_tok)


def from_pretrained(name: str) -> JambaLM:
    """A Jamba of a folder or a hub id in any layout that `mamba_core.load` reads."""
    core = factory.load(name, backend="torch")
    if (core.config.architecture, core.config.task) != ("jamba", "lm"):
        raise ValueError(f"{name} is of architecture {core.config.architecture!r}; expected a language model of jamba")
    model = JambaLM.__new__(JambaLM)
    Wrapped.__init__(model, core, "mambapy")
    model.config, model.padding_idx, model.vocab_size = core.config, core.config.pad_token_id, core.config.vocab_size
    return model


_INSIDE = ("AttentionLayer", "AttentionSDPA", "MambaLayer", "SparseMoEBlock", "MLP")
__getattr__ = refuse(__name__, dict.fromkeys(_INSIDE, "its layers are inside a model of ours here; take Jamba"))
