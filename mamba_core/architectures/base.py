"""What an architecture's file is made of: a config, the blocks, what they carry, their parameters and their graph.

A file exports

    Config: type[BaseConfig], whose `architecture` is the file's name
    PRESETS: dict[str, Config]
    TRAITS: Traits
    blocks(config) -> tuple[Block, ...]                   one entry a layer
    state(config, layer) -> tuple[Field, ...]             what the layer carries, () for nothing
    parameters(config) -> Iterator[Parameter]             of the blocks, under "backbone.layers."
    graph(config, residual) -> Iterator[Node]             of the blocks, from the node `residual`; the last node is the
                                                          residual stream after them

What stands before and behind the blocks is the task's: see `mamba_core.tasks.base`.
"""

import dataclasses
import hashlib
import reprlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Self

from mamba_core.spec.blocks.attention import Attention
from mamba_core.spec.blocks.feed_forward import FeedForward
from mamba_core.spec.state import Field, layer_type

COMPUTE_DTYPES = ("float32", "bfloat16", "float16")
MAX_SIZE = 2**31 - 1  # of any size: what indexes of 32 bits can count
_SHOWN = reprlib.Repr()  # of a value in a message, which has an end
_SHOWN.maxstring = _SHOWN.maxlong = _SHOWN.maxother = 120
_SHOWN.maxlevel = 3


class Block(NamedTuple):
    """A residual block: residual + mixer(norm(residual)), and where it has one the same with a feed-forward.

    mixer, feed_forward: file names in `backends/*/mixers`.
    """

    mixer: str
    feed_forward: str | None = None


class Traits(NamedTuple):
    """What laws, parity and generation ask before they ask for more.

    causal: no position sees a later one.
    steps: the model has a state and goes on from it, position by position.
    packs: `segment_ids` separate sequences in a row.
    """

    causal: bool = True
    steps: bool = True
    packs: bool = True


class Balance(NamedTuple):
    """The loss in training that draws routers towards equal use of experts: `spec.ops.mixture_of_experts.balance_loss`.

    coefficient: its weight beside the task's loss. top_k: how many experts compute a position.
    """

    coefficient: float
    top_k: int


class Facts(NamedTuple):
    """What an architecture's file says of one config.

    fields, types: of what each layer carries, and the NamedTuple of it. grows: whether any field has a capacity.
    """

    traits: Traits
    fields: tuple[tuple[Field, ...], ...]
    types: tuple[type, ...]
    grows: bool


class _Kept:
    """A place beside the fields, which `vars` and copies do not see."""

    __slots__ = ("_facts",)
    _facts: Facts


@dataclass(frozen=True, kw_only=True)
class BaseConfig(_Kept):
    """The fields that every architecture has.

    Attributes:
        d_model: width of the residual stream.
        n_layer: number of residual blocks.
        vocab_size: entries that can be produced; the embedding has `padded_vocab_size` rows.
        norm_eps: added to the mean square in the norms.
        residual_in_fp32: keep the residual stream in float32 whatever the compute dtype.
        tie_embeddings: the head is the embedding.
        pad_vocab_size_multiple: the embedding's rows are padded up to a multiple of this.
        initializer_range: standard deviation of the initial embedding.
        bos_token_id, eos_token_id, pad_token_id: of the tokenizer, where the checkpoint says; eos may be several.
        task: what the model is for, a file in `mamba_core/tasks`: "lm" for a language model; "features" for one without
            its head; "layers" for the blocks alone, without embedding and final norm, from embeddings (b, l, d).
        task_options: the fields of the task, if it has some.
        extra: fields of a checkpoint's config that mean nothing to the model; kept, and written back.
    """

    d_model: int = 768
    n_layer: int = 24
    vocab_size: int = 50277
    norm_eps: float = 1e-5
    residual_in_fp32: bool = True
    tie_embeddings: bool = True
    pad_vocab_size_multiple: int = 8
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    task: str = "lm"
    task_options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    extra: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    architecture: ClassVar[str]
    # Fields that do not decide what a decode state means. An architecture adds its own.
    NOT_OF_STATE: ClassVar[tuple[str, ...]] = (
        *("vocab_size", "residual_in_fp32", "tie_embeddings", "pad_vocab_size_multiple", "initializer_range"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "task", "task_options", "extra"),
    )

    def __post_init__(self) -> None:
        from mamba_core import tasks

        self.expect(f"an integer from 1 to {MAX_SIZE}", is_size, "d_model", "n_layer", "vocab_size")
        self.expect(f"an integer from 1 to {MAX_SIZE}", is_size, "pad_vocab_size_multiple")
        self.expect("a positive number", is_positive, "norm_eps", "initializer_range")
        self.expect("true or false", is_bool, "residual_in_fp32", "tie_embeddings")
        self.expect(f"one of {', '.join(tasks.names())}", lambda value: value in tasks.names(), "task")
        if isinstance(self.eos_token_id, list):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        self.expect(
            "an integer or nothing", lambda value: value is None or is_id(value), "bos_token_id", "pad_token_id"
        )
        self.expect("an integer, several or nothing", lambda _: all(map(is_id, self.eos_token_ids)), "eos_token_id")
        self.expect("a mapping", lambda value: isinstance(value, Mapping), "task_options")
        tasks.of(self)

    def expect(self, expected: str, holds: Callable[[Any], bool], *names: str) -> None:
        """Raises ValueError for a field whose value is not what is expected."""
        for name in names:
            if not holds(value := getattr(self, name)):
                raise ValueError(f"{name} is {_SHOWN.repr(value)}; expected {expected}")

    @property
    def facts(self) -> Facts:
        """What the architecture's file says of this config. Once asked for, a compiler finds it without a search."""
        try:
            return self._facts
        except AttributeError:
            object.__setattr__(self, "_facts", _facts(self))
            return self._facts

    def __getstate__(self) -> dict[str, Any]:
        """Of copies and pickles: the fields alone."""
        return vars(self)

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

    def attention(self, layer: int) -> Attention | None:
        """The sizes of a layer's attention; None for a layer of the architecture's own mixer."""
        return None

    def feed_forward(self, layer: int) -> FeedForward | None:
        """The sizes of what follows a layer's mixer; None where nothing does."""
        return None

    @property
    def balance(self) -> Balance | None:
        """The loss of routers in training; None where there is none."""
        return None

    def identity(self) -> dict[str, Any]:
        """What decides a decode state's shapes and meaning: not initial values, and not the task."""
        names = (item.name for item in dataclasses.fields(self))
        return {name: getattr(self, name) for name in names if name not in self.NOT_OF_STATE}

    @property
    def fingerprint(self) -> str:
        """A hash of the architecture and `identity`."""
        text = repr((self.architecture, sorted(self.identity().items())))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """Our own fields, as `mamba_core.config.from_dict` reads them."""
        return {"architecture": self.architecture} | dataclasses.asdict(self)

    @classmethod
    def from_hf(cls, fields: Mapping[str, Any]) -> Self:
        """From the config.json of transformers. Raises ValueError for a config of another architecture."""
        return cls._read("hf", fields)

    def to_hf(self) -> dict[str, Any]:
        """As transformers reads it. Raises ValueError for a config that it cannot hold."""
        return self._written("hf")

    @classmethod
    def from_mamba_ssm(cls, fields: Mapping[str, Any]) -> Self:
        """From the config.json of mamba_ssm. Raises ValueError for a config of another architecture."""
        return cls._read("mamba_ssm", fields)

    def to_mamba_ssm(self) -> dict[str, Any]:
        """As mamba_ssm reads it. Raises ValueError for a config that it cannot hold."""
        return self._written("mamba_ssm")

    @classmethod
    def _read(cls, layout: str, fields: Mapping[str, Any]) -> Self:
        from mamba_core.weights import tables

        config = tables.read_config(layout, fields)
        if not isinstance(config, cls):
            raise ValueError(f"the config is of architecture {config.architecture!r}; expected {cls.architecture!r}")
        return config

    def _written(self, layout: str) -> dict[str, Any]:
        from mamba_core.weights import tables

        return tables.write_config(layout, self)


def is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_size(value: Any) -> bool:
    return is_int(value) and 1 <= value <= MAX_SIZE


def is_id(value: Any) -> bool:
    return is_int(value) and abs(value) <= MAX_SIZE


def is_number(value: Any) -> bool:
    """Whether it is a finite number that a float can hold."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_positive(value: Any) -> bool:
    return is_number(value) and value > 0


def _facts(config: BaseConfig) -> Facts:
    from mamba_core import architectures

    file = architectures.of(config)
    fields = tuple(file.state(config, layer) for layer in range(config.n_layer))
    types = tuple(layer_type(tuple(field.name for field in of_layer)) for of_layer in fields)
    grows = any(field.grows is not None for of_layer in fields for field in of_layer)
    return Facts(file.TRAITS, fields, types, grows)
