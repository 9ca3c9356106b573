"""MiniMamba's models. Each has a model of ours as `core`, and a state dict with MiniMamba's names."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba_core import generation
from mamba_core.compat.minimamba.config import BaseMambaConfig, InferenceParams, ours
from mamba_core.compat.minimamba.core import CachedModule, MambaEncoder, run
from mamba_core.compat.wrapped import Wrapped, drawn_seeds, seeded


class MambaForCausalLM(Wrapped, CachedModule):
    """Logits (b, l, padded vocabulary) of input_ids (b, l)."""

    def __init__(self, config: Any):
        super().__init__(seeded(ours(config, task="lm")), "minimamba")
        self.config = config

    def forward(self, input_ids: Tensor, inference_params: Any = None, labels: Tensor | None = None):
        """The logits; with labels (b, l), of which -100 does not count, a dict of loss and logits."""
        logits = run(self.core, inference_params, input_ids).logits
        if labels is None:
            return logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        return {"loss": loss, "logits": logits}

    def prepare_inputs_for_generation(self, input_ids: Tensor, inference_params: Any = None) -> dict[str, Any]:
        return {"input_ids": input_ids, "inference_params": inference_params or InferenceParams()}

    def generate(
        self,
        input_ids: Tensor,
        max_length: int = 50,
        max_new_tokens: int | None = None,
        temperature: float = 1.0,
        top_p: float = 0.9,
        top_k: int | None = None,
        do_sample: bool = True,
        pad_token_id: int | None = None,
        eos_token_id: int | None = None,
        use_cache: bool = True,
    ) -> Tensor:
        """input_ids (b, l) and what follows, (b, l + new): by `mamba_core.generate`, with PyTorch's generator as seed.

        A row that has ended is filled up with pad_token_id, or where there is none with eos_token_id. use_cache changes
        nothing: the state is always carried.
        """
        length = input_ids.shape[1]
        result = generation.generate(
            self.core,
            input_ids,
            max_new_tokens=max(0, max_length - length) if max_new_tokens is None else max_new_tokens,
            **_sampling(do_sample, temperature, top_p, top_k),
            stop=() if eos_token_id is None else eos_token_id,
            seed=drawn_seeds(len(input_ids)),
        )
        fill: Any = eos_token_id if pad_token_id is None else pad_token_id
        longest = max(map(len, result.tokens), default=0)
        rows = [row + [fill] * (longest - len(row)) for row in result.tokens]
        new = torch.tensor(rows, dtype=input_ids.dtype, device=input_ids.device).reshape(len(input_ids), longest)
        return torch.cat([input_ids, new], dim=1)

    def generate_streaming(
        self,
        input_ids: Tensor,
        max_new_tokens: int = 50,
        temperature: float = 1.0,
        top_p: float = 0.9,
        eos_token_id: int | None = None,
    ) -> Iterator[int]:
        """The tokens after one row of input_ids, one by one."""
        if len(input_ids) != 1:
            raise ValueError(f"input_ids has {len(input_ids)} rows; generate_streaming continues one")
        sampling = generation.Sampling(**_sampling(True, temperature, top_p, None))
        stop = () if eos_token_id is None else eos_token_id
        run_ = generation.Run(
            self.core, input_ids, sampling, max_new_tokens=max_new_tokens, stop=stop, seed=drawn_seeds(1)
        )
        for _ in run_.steps():
            yield run_.rows[0].tokens[-1]


def _sampling(do_sample: bool, temperature: float, top_p: float, top_k: int | None) -> dict[str, Any]:
    if not do_sample:
        return {"temperature": 0.0}
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; expected more than 0, or do_sample=False")
    return {"temperature": temperature, "top_p": top_p, "top_k": top_k or 0}


class Mamba(MambaForCausalLM):
    """The name of the first releases."""


class MambaForSequenceClassification(Wrapped):
    """Logits (b, num_labels). Of config.dropout, in training: on what the classifier reads, as in MiniMamba."""

    def __init__(self, config: Any):
        options = {"num_labels": config.num_labels, "bias": True, "pooling": config.pooling_strategy}
        vocabulary = {"vocab_size": getattr(config, "vocab_size", 32000), "pad_vocab_size_multiple": 1}
        told = {"task": "sequence_classification", "task_options": options}
        super().__init__(seeded(ours(config, **vocabulary, **told)), "minimamba")
        self.config, self.num_labels = config, config.num_labels
        self.dropout = nn.Dropout(config.dropout)
        self.core.score.register_forward_pre_hook(lambda _, given: (self.dropout(given[0]),))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None):
        """attention_mask (b, l), on either side; with labels (b,) a dict of loss and logits."""
        logits = self.core(input_ids, mask=None if attention_mask is None else attention_mask.bool()).logits
        if labels is None:
            return logits
        if self.num_labels == 1:
            return {"loss": F.mse_loss(logits.flatten(), labels.flatten().to(logits.dtype)), "logits": logits}
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class MambaForFeatureExtraction(Wrapped, CachedModule):
    """Hidden states (b, l, d) of ids (b, l) where the config has a vocabulary, or of embeddings (b, l, d)."""

    def __init__(self, config: BaseMambaConfig):
        has_embeddings = getattr(config, "vocab_size", 0) > 0
        if has_embeddings:
            super().__init__(seeded(ours(config, task="features")), "minimamba")
        else:
            nn.Module.__init__(self)
            self.core, self.backbone = None, MambaEncoder(config)
        self.config, self.has_embeddings = config, has_embeddings

    def forward(self, inputs: Tensor, inference_params: Any = None) -> Tensor:
        if self.core is None:
            return self.backbone(inputs, inference_params)
        if inputs.ndim == 2:
            return run(self.core, inference_params, inputs).hidden
        return run(self.core, inference_params, inputs_embeds=inputs).hidden
