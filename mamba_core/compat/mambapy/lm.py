"""mambapy.lm over ours: a language model of Mamba or Mamba-2."""

from typing import Any

import torch
from torch import Tensor

from mamba_core import factory, generation
from mamba_core.compat.mambapy.mamba import Mamba, MambaConfig, RMSNorm, ours, put_back, state_of
from mamba_core.compat.mambapy.mamba2 import Mamba2, Mamba2Config
from mamba_core.compat.wrapped import Wrapped, drawn_seeds, seeded

__all__ = ["LM", "Mamba", "Mamba2", "Mamba2Config", "MambaConfig", "MambaLM", "RMSNorm", "from_pretrained"]


class LanguageModel(Wrapped):
    """What the language models share."""

    def step(self, token: Tensor, caches: list) -> tuple[Tensor, list]:
        """token (b,) and a cache for each layer to logits (b, v); the caches are replaced in their list."""
        output = self.core(token[:, None], state_of(self.core, caches, len(token)))
        put_back(output.state, caches)
        return output.logits[:, 0], caches

    def _continued(
        self, tokenizer, prompt: str, count: int, rows: int, sample: bool, top_k, temperature: float
    ) -> list:
        """The ids of the prompt and of what follows, a list a row."""
        ids = tokenizer(prompt, return_tensors="pt").input_ids[0].tolist()
        if sample and temperature <= 0:
            raise ValueError(f"temperature is {temperature}; expected more than 0, or sample=False")
        settings: dict[str, Any] = {"temperature": temperature, "top_k": top_k or 0} if sample else {}
        seeds = drawn_seeds(rows)
        found = generation.generate(self.core, [ids] * rows, max_new_tokens=count, seed=seeds, **settings)
        return [ids + tokens for tokens in found.tokens]


class LM(LanguageModel):
    """Logits (b, l, v) of ids (b, l). As in mambapy, the head has its own weights, and id 0's row is not trained."""

    def __init__(self, model_config: Any, vocab_size: int, pad_vocab_size_multiple: int | None = None):
        vocabulary = {"vocab_size": vocab_size, "pad_vocab_size_multiple": pad_vocab_size_multiple or 1}
        super().__init__(seeded(ours(model_config, task="lm", tie_embeddings=False, **vocabulary)), "mambapy")
        self.core.backbone.embeddings.padding_idx = 0
        self.config = model_config

    def forward(self, tokens: Tensor) -> Tensor:
        return self.core(tokens).logits

    def generate(
        self,
        tokenizer,
        prompt: str,
        num_tokens: int = 50,
        batch_size: int = 1,
        sample: bool = True,
        top_k: int | None = 40,
        temperature: float = 1.0,
    ):
        """The prompt and what follows as text, a list where batch_size is more than 1. By `mamba_core.generate`."""
        rows = self._continued(tokenizer, prompt, num_tokens, batch_size, sample, top_k, temperature)
        texts = [tokenizer.decode(row) for row in rows]
        return texts[0] if batch_size == 1 else texts

    def configure_optimizers(self, weight_decay: float, learning_rate: float, betas, device_type: str):
        """AdamW, which decays parameters of two axes or more."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        groups = [
            {"params": [value for value in trained if (value.ndim >= 2) == decays], "weight_decay": decay}
            for decays, decay in ((True, weight_decay), (False, 0.0))
        ]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=device_type == "cuda")


MambaLM = LM


def from_pretrained(name: str) -> LM:
    """A language model of ours, of a folder or a hub id in any layout that `mamba_core.load` reads, with these methods.

    Its head is tied to the embedding where the checkpoint says so.
    """
    core = factory.load(name, backend="torch")
    kinds = ("mamba", "mamba2")
    if core.config.architecture not in kinds or core.config.task != "lm":
        raise ValueError(
            f"{name} is of architecture {core.config.architecture!r} and task {core.config.task!r}; expected a "
            f"language model of {' or '.join(kinds)}"
        )
    model = LM.__new__(LM)
    Wrapped.__init__(model, core, "mambapy")
    model.config = core.config
    return model
