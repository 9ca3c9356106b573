"""MiniMamba's configs, and how they are said to ours."""

import dataclasses
import json
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from mamba_core import carried
from mamba_core.weights.configs import read_config
from mamba_core.weights.formats import read_json

STATE = "state"  # the key, in a cache, of the model and its State


@dataclass
class BaseMambaConfig:
    """The fields of MiniMamba's, with its defaults. use_fast_path, device and dtype change nothing, as there."""

    d_model: int = 768
    n_layer: int = 12
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    dt_rank: int | str = "auto"
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_init: str = "random"
    dt_scale: float = 1.0
    dt_init_floor: float = 1e-4
    conv_bias: bool = True
    bias: bool = False
    norm_epsilon: float = 1e-5
    rms_norm: bool = True
    use_fast_path: bool = True
    device: str | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.dt_rank == "auto":
            self.dt_rank = max(1, self.d_model // 16)

    @property
    def d_inner(self) -> int:
        return int(self.expand * self.d_model)

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any]) -> Self:
        computed = ("d_inner", "padded_vocab_size")
        return cls(**{name: value for name, value in config_dict.items() if name not in computed})

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def save_to_json(self, file_path) -> None:
        Path(file_path).write_text(self.to_json_string())

    @classmethod
    def from_json(cls, file_path) -> Self:
        return cls.from_dict(read_json(file_path))

    from_json_file = from_json


@dataclass
class MambaLMConfig(BaseMambaConfig):
    vocab_size: int = 32000
    pad_vocab_size_multiple: int = 8
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        multiple = self.pad_vocab_size_multiple
        self.padded_vocab_size = -(-self.vocab_size // multiple) * multiple


@dataclass
class MambaClassificationConfig(BaseMambaConfig):
    num_labels: int = 2
    pooling_strategy: str = "last"
    dropout: float = 0.1


MambaConfig = MambaLMConfig


@dataclass
class InferenceParams:
    """What a call goes on from: `cache["state"]` is a model of ours and its State. seqlen_offset is the caller's."""

    cache: dict[str, Any] = field(default_factory=dict)
    seqlen_offset: int = 0
    max_sequence_len: int = 2048
    max_batch_size: int = 1

    def reset_cache(self) -> None:
        self.cache.clear()
        self.seqlen_offset = 0

    def get_cache_info(self) -> dict[str, Any]:
        """Layers, tensors and MiB of the state that a model has left here."""
        return cache_info(self)


def ours(config: BaseMambaConfig, **told: Any):
    """Our config of the same model; told: what theirs does not say.

    Raises:
        ValueError: a field has a value that ours cannot have, such as rms_norm=False.
    """
    fields = dataclasses.asdict(config)
    fields.pop("dropout", None)  # the classifier's own
    return read_config("minimamba", fields, architecture="minimamba", told=told)


def store_of(inference_params: Any) -> MutableMapping[str, Any]:
    """Where the state is kept: the cache of an `InferenceParams`, or what MiniMamba 0.2 had users write."""
    for name in ("cache", "key_value_memory_dict"):
        if isinstance(found := getattr(inference_params, name, None), MutableMapping):
            return found
    raise TypeError(
        f"inference_params is {type(inference_params).__name__}; expected InferenceParams, or an object with a mapping "
        "cache or key_value_memory_dict"
    )


def cache_info(inference_params: Any) -> dict[str, Any]:
    empty = {"cached_layers": 0, "total_tensors": 0, "memory_mb": 0.0}
    if inference_params is None:
        return empty
    offset = {"seqlen_offset": inference_params.seqlen_offset}
    store = store_of(inference_params)
    if STATE not in store:
        return empty | offset
    core, state = store[STATE]
    info = carried.state_info(core, state)
    tensors = sum(len(layer.bytes) for layer in info.layers)
    return {"cached_layers": len(info.layers), "total_tensors": tensors, "memory_mb": info.bytes / 2**20} | offset
