"""Model configurations: frozen dataclasses, one an architecture, with the sizes that follow from them.

`from_dict` reads our own fields, those of Hugging Face transformers and those of mamba_ssm; `to_hf` and
`to_mamba_ssm` write theirs.
"""

import dataclasses
import hashlib
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

COMPUTE_DTYPES = ("float32", "bfloat16", "float16")
TASKS = ("lm", "features", "layers")
MAX_SIZE = 2**31 - 1  # of any size: what indexes of 32 bits can count


@dataclass(frozen=True)
class MambaConfig:
    """Mamba-1 (Gu and Dao 2023, section 3.4), with the defaults of mamba_ssm and the size of mamba-130m.

    Attributes:
        d_model: width of the residual stream.
        n_layer: number of residual blocks.
        vocab_size: entries that can be produced; the embedding has `padded_vocab_size` rows.
        d_state: states per channel.
        d_conv: width of the short convolution.
        expand: d_inner = int(expand * d_model).
        dt_rank: rank of the step-size projection, "auto" for ceil(d_model / 16).
        dt_min, dt_max, dt_init_floor: initial step sizes are log-uniform in [dt_min, dt_max], at least the floor.
        dt_init, dt_scale: initial dt_proj.weight, "random" or "constant", scaled by dt_scale / sqrt(dt_rank).
        bias, conv_bias: whether in_proj and out_proj, and the convolution, have a bias.
        norm_eps: added to the mean square in the norms.
        residual_in_fp32: keep the residual stream in float32 whatever the compute dtype.
        tie_embeddings: the head is the embedding.
        pad_vocab_size_multiple: the embedding's rows are padded up to a multiple of this.
        rescale_prenorm_residual: divide the initial out_proj.weight by sqrt(n_layer).
        initializer_range: standard deviation of the initial embedding.
        bos_token_id, eos_token_id, pad_token_id: of the tokenizer, where the checkpoint says; eos may be several.
        task: "lm" for a language model; "features" for one without its head; "layers" for the residual blocks alone,
            without embedding and final norm, from embeddings (b, l, d).
        compat: "minimamba" runs checkpoints of the package MiniMamba as they were trained, which is not Mamba: the dt
            bias counts twice, and the gate z multiplies without its SiLU.
        extra: fields of a checkpoint's config that mean nothing to the model; kept, and written back.
    """

    d_model: int = 768
    n_layer: int = 24
    vocab_size: int = 50277
    d_state: int = 16
    d_conv: int = 4
    expand: float = 2
    dt_rank: int | str = "auto"
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_init: str = "random"
    dt_scale: float = 1.0
    dt_init_floor: float = 1e-4
    bias: bool = False
    conv_bias: bool = True
    norm_eps: float = 1e-5
    residual_in_fp32: bool = True
    tie_embeddings: bool = True
    pad_vocab_size_multiple: int = 8
    rescale_prenorm_residual: bool = True
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    task: str = "lm"
    compat: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    architecture: ClassVar[str] = "mamba"

    def __post_init__(self):
        for name in ("d_model", "n_layer", "vocab_size", "d_state", "d_conv", "pad_vocab_size_multiple"):
            _expect(self, name, f"an integer from 1 to {MAX_SIZE}", _is_size)
        for name in ("expand", "dt_min", "dt_max", "dt_scale", "norm_eps", "initializer_range"):
            _expect(self, name, "a positive number", lambda value: _is_number(value) and value > 0)
        for name in ("bias", "conv_bias", "residual_in_fp32", "tie_embeddings", "rescale_prenorm_residual"):
            _expect(self, name, "true or false", lambda value: isinstance(value, bool))
        _expect(self, "dt_rank", f"an integer from 1 to {MAX_SIZE} or 'auto'", lambda v: v == "auto" or _is_size(v))
        _expect(self, "dt_init", "'random' or 'constant'", lambda value: value in ("random", "constant"))
        _expect(self, "task", f"one of {', '.join(TASKS)}", lambda value: value in TASKS)
        _expect(self, "compat", "'minimamba' or nothing", lambda value: value in (None, "minimamba"))
        _expect(self, "dt_init_floor", "a number >= 0", lambda value: _is_number(value) and value >= 0)
        if isinstance(self.eos_token_id, list):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            ids = self.eos_token_ids if name == "eos_token_id" else (getattr(self, name),)
            _expect(self, name, "an integer or nothing", lambda _, ids=ids: all(i is None or _is_id(i) for i in ids))
        _expect(self, "dt_max", f"at least dt_min={self.dt_min!r}", lambda value: value >= self.dt_min)
        if not 1 <= self.expand * self.d_model < MAX_SIZE + 1:
            raise ValueError(
                f"expand={self.expand!r} of d_model={self.d_model} is no number of channels from 1 to {MAX_SIZE}"
            )

    @property
    def d_inner(self) -> int:
        return int(self.expand * self.d_model)

    @property
    def dt_rank_size(self) -> int:
        return math.ceil(self.d_model / 16) if self.dt_rank == "auto" else self.dt_rank

    @property
    def padded_vocab_size(self) -> int:
        multiple = self.pad_vocab_size_multiple
        return -(-self.vocab_size // multiple) * multiple

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every token that ends a text."""
        if self.eos_token_id is None:
            return ()
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    @property
    def fingerprint(self) -> str:
        """A hash of what decides a decode state's shapes and meaning: the sizes, the norm and the arithmetic.

        Not the initial values, and not the task: its models carry the same state.
        """
        sizes = (self.d_model, self.n_layer, self.d_inner, self.d_state, self.d_conv, self.dt_rank_size)
        rest = (self.compat or self.architecture, self.bias, self.conv_bias, self.norm_eps)
        return hashlib.sha256(repr(sizes + rest).encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """Our own fields, as `from_dict` reads them."""
        return {"architecture": self.architecture} | dataclasses.asdict(self)

    @classmethod
    def from_hf(cls, fields: Mapping[str, Any]) -> "MambaConfig":
        """From the config.json of transformers' MambaForCausalLM or MambaModel, or from one of `to_hf`.

        Absent fields take transformers' defaults.
        """
        fields = dict(fields)
        model_type = fields.pop("model_type", "mamba")
        if model_type not in ("mamba", _HF_MINIMAMBA):
            raise ValueError(f"config has model_type {model_type!r}; this version reads 'mamba' and {_HF_MINIMAMBA!r}")
        compat = "minimamba" if model_type == _HF_MINIMAMBA else None
        expected = ("silu", "swish") if compat is None else (compat,)
        if (activation := fields.pop("hidden_act", expected[0])) not in expected:
            raise ValueError(f"config has hidden_act {activation!r}; that of {model_type!r} is {expected[0]!r}")
        task = "features" if fields.pop("architectures", None) == ["MambaModel"] else "lm"
        for name in _HF_DTYPES:  # written anew: what they say is not of the config
            fields.pop(name, None)
        pop_plain(fields, _HF_PLAIN)
        known = {ours: fields.pop(theirs, default) for ours, (theirs, default) in _HF_FIELDS.items()}
        if _is_size(known["d_model"]) and known["dt_rank"] == math.ceil(known["d_model"] / 16):
            known["dt_rank"] = "auto"
        padded, ours = known["vocab_size"], fields.pop("mamba_core", {})
        inner = fields.pop("intermediate_size", None)
        if not isinstance(ours, Mapping) or not set(ours) <= set(_HF_HIDDEN):
            raise ValueError(f"config has mamba_core fields {ours!r}; expected some of {', '.join(_HF_HIDDEN)}")
        config = cls(**known | {"pad_vocab_size_multiple": 1} | dict(ours), task=task, compat=compat, extra=fields)
        if config.padded_vocab_size != padded:  # transformers keeps our fields when it resizes the embedding
            config = dataclasses.replace(config, vocab_size=padded, pad_vocab_size_multiple=1)
        if inner is not None and inner != config.d_inner:
            raise ValueError(
                f"config has intermediate_size {inner}; expand={config.expand} of hidden_size={config.d_model} "
                f"is {config.d_inner}"
            )
        return config

    def to_hf(self) -> dict[str, Any]:
        """As transformers reads it: vocab_size counts the padded rows; what it has no use for is under mamba_core.

        Fields of `extra` that mean something to transformers or mlx-lm are not written.

        rescale_prenorm_residual is written as false, because transformers 5 divides the out_proj.weight that it
        loads by sqrt(n_layer) where it is true. With `compat`, model_type and hidden_act are ones that transformers
        does not have: its Auto classes refuse the first, MambaForCausalLM only the second. An expand that is no whole
        number is written as it is: transformers refuses it, and this is what reads it back.

        Raises:
            ValueError: task "layers", which has no form there.
        """
        if self.task == "layers":
            raise ValueError(
                "a config of task 'layers' cannot be written as hf, whose models have an embedding and a final norm; "
                "layout mambapy holds the layers alone"
            )
        ours = {name: getattr(self, name) for name in _HF_HIDDEN}
        known = {theirs: _like(default, getattr(self, name)) for name, (theirs, default) in _HF_FIELDS.items()}
        derived = {
            "model_type": "mamba" if self.compat is None else _HF_MINIMAMBA,
            "architectures": ["MambaForCausalLM" if self.task == "lm" else "MambaModel"],
            "hidden_act": self.compat or "silu",
            "intermediate_size": self.d_inner,
            "time_step_rank": self.dt_rank_size,
            "vocab_size": self.padded_vocab_size,
            "rescale_prenorm_residual": False,
        }
        extra = {name: value for name, value in self.extra.items() if name not in _HF_NOT_EXTRA}
        return extra | known | derived | {"mamba_core": ours}

    @classmethod
    def from_mamba_ssm(cls, fields: Mapping[str, Any]) -> "MambaConfig":
        """From the config.json of mamba_ssm's MambaLMHeadModel, `ssm_cfg` included."""
        fields = dict(fields)
        ssm = fields.pop("ssm_cfg", None) or {}
        if not isinstance(ssm, Mapping):
            raise TypeError(f"config has ssm_cfg {ssm!r}; expected a JSON object")
        ssm = dict(ssm)
        if (layer := ssm.pop("layer", "Mamba1")) != "Mamba1":
            raise ValueError(f"config has ssm_cfg layer {layer!r}; this version reads 'Mamba1'")
        pop_plain(fields, _MAMBA_SSM_PLAIN)
        for name in _MAMBA_SSM_SPEED:
            fields.pop(name, None)
            ssm.pop(name, None)
        if unknown := sorted(set(ssm) - set(_SSM_FIELDS)):
            raise ValueError(f"config has unknown fields in ssm_cfg: {', '.join(unknown)}")
        top = {name: fields.pop(name, default) for name, default in _MAMBA_SSM_FIELDS.items()}
        return cls(**top, **ssm, extra=fields)

    def to_mamba_ssm(self) -> dict[str, Any]:
        """As mamba_ssm reads it, which takes no other fields: token ids, initializer_range and such are not written.

        Raises:
            ValueError: another norm_eps than the one that its norms have, another task than "lm", or `compat`.
        """
        if self.task != "lm":
            raise ValueError(f"task {self.task!r} cannot be written as mamba_ssm, which holds language models only")
        if self.compat is not None:
            raise ValueError(f"compat={self.compat!r} cannot be written as mamba_ssm, which computes another model")
        if self.norm_eps != 1e-5:
            raise ValueError(f"norm_eps={self.norm_eps} cannot be written: mamba_ssm fixes it at 1e-05")
        top = {name: getattr(self, name) for name in _MAMBA_SSM_FIELDS}
        defaults = MambaConfig()
        chosen = {name: getattr(self, name) for name in _SSM_FIELDS}
        ssm = {name: value for name, value in chosen.items() if value != getattr(defaults, name)}
        return top | {"ssm_cfg": ssm, "rms_norm": True, "fused_add_norm": True}


# ours -> (the name in transformers' MambaConfig, its default there)
_HF_FIELDS = {
    "d_model": ("hidden_size", 768),
    "n_layer": ("num_hidden_layers", 32),
    "vocab_size": ("vocab_size", 50280),
    "d_state": ("state_size", 16),
    "d_conv": ("conv_kernel", 4),
    "expand": ("expand", 2),
    "dt_rank": ("time_step_rank", "auto"),
    "dt_min": ("time_step_min", 0.001),
    "dt_max": ("time_step_max", 0.1),
    "dt_init": ("time_step_init_scheme", "random"),
    "dt_scale": ("time_step_scale", 1.0),
    "dt_init_floor": ("time_step_floor", 1e-4),
    "bias": ("use_bias", False),
    "conv_bias": ("use_conv_bias", True),
    "norm_eps": ("layer_norm_epsilon", 1e-5),
    "residual_in_fp32": ("residual_in_fp32", True),
    "tie_embeddings": ("tie_word_embeddings", True),
    "rescale_prenorm_residual": ("rescale_prenorm_residual", False),
    "initializer_range": ("initializer_range", 0.1),
    "bos_token_id": ("bos_token_id", 0),
    "eos_token_id": ("eos_token_id", 0),
    "pad_token_id": ("pad_token_id", 0),
}

_HF_MINIMAMBA = "mamba_core_minimamba"

# What would change the function (in mlx-lm: norms of dt, B and C), with the one value that this architecture has.
_HF_PLAIN = {"use_bcdt_rms": False}
_HF_DTYPES = ("torch_dtype", "dtype")
# By the last this project's own fields are told.
_HF_NOT_EXTRA = (*_HF_PLAIN, *_HF_DTYPES, "architecture")

_HF_HIDDEN = ("vocab_size", "pad_vocab_size_multiple", "rescale_prenorm_residual")

_MAMBA_SSM_FIELDS = {
    "d_model": 2560,
    "n_layer": 64,
    "vocab_size": 50277,
    "residual_in_fp32": True,
    "tie_embeddings": True,
    "pad_vocab_size_multiple": 8,
}
_SSM_FIELDS = (
    *("d_state", "d_conv", "expand", "dt_rank", "dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor"),
    *("bias", "conv_bias"),
)
# Fields that would change the function, with the one value that this architecture has; then those of speed only.
_MAMBA_SSM_PLAIN = {"rms_norm": True, "d_intermediate": 0, "attn_layer_idx": [], "attn_cfg": {}}
_MAMBA_SSM_SPEED = ("fused_add_norm", "use_fast_path")


def from_dict(fields: Mapping[str, Any]) -> MambaConfig:
    """A config from a parsed JSON object in our own fields, those of transformers or those of mamba_ssm.

    Raises:
        ValueError: the fields are of none of the three, or a value is out of range.
    """
    if not isinstance(fields, Mapping):
        raise TypeError(f"config is {type(fields).__name__}; expected a JSON object")
    if "hidden_size" in fields or "model_type" in fields:
        return MambaConfig.from_hf(fields)
    if "ssm_cfg" in fields or "fused_add_norm" in fields or "rms_norm" in fields:
        return MambaConfig.from_mamba_ssm(fields)
    fields = dict(fields)
    architecture = fields.pop("architecture", "mamba")
    if not isinstance(architecture, str) or architecture not in CONFIGS:
        raise ValueError(f"config has architecture {architecture!r}; known: {', '.join(CONFIGS)}")
    known = {item.name for item in dataclasses.fields(CONFIGS[architecture])}
    if unknown := sorted(set(fields) - known):
        raise ValueError(f"config has unknown fields: {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    return CONFIGS[architecture](**fields)


def preset(name: str) -> MambaConfig:
    """The config of a published model, such as "mamba-130m"."""
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}; expected one of {', '.join(PRESETS)}")
    return PRESETS[name]


def _expect(config, name, expected, holds) -> None:
    value = getattr(config, name)
    if not holds(value):
        raise ValueError(f"{name} is {value!r}; expected {expected}")


def pop_plain(fields: dict[str, Any], plain: Mapping[str, Any]) -> None:
    """Drop fields that have the one value of this architecture. Raises ValueError for another."""
    for name, only in plain.items():
        if (value := fields.pop(name, only)) not in (only, None):
            raise ValueError(f"config has {name}={value!r}; this version reads {name}={only!r} only")


def _like(default, value):
    """The number in the default's type, which transformers checks, where that does not change it."""
    alike = type(default)(value) if _is_number(default) and _is_number(value) else value
    return alike if alike == value else value


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_size(value) -> bool:
    return _is_int(value) and 1 <= value <= MAX_SIZE


def _is_id(value) -> bool:
    return _is_int(value) and abs(value) <= MAX_SIZE


def _is_number(value) -> bool:
    """Whether it is a finite number that a float can hold."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


CONFIGS = {"mamba": MambaConfig}

PRESETS: dict[str, MambaConfig] = {
    "mamba-130m": MambaConfig(d_model=768, n_layer=24),
    "mamba-370m": MambaConfig(d_model=1024, n_layer=48),
    "mamba-790m": MambaConfig(d_model=1536, n_layer=48),
    "mamba-1.4b": MambaConfig(d_model=2048, n_layer=48),
    "mamba-2.8b": MambaConfig(d_model=2560, n_layer=64),
}
