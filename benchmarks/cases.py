"""What is timed: the work, its sizes and dtype, its inputs, and what the float64 reference makes of them."""

import dataclasses
import functools
import math
from dataclasses import dataclass

import numpy as np

from mamba_core.architectures.jamba import JambaConfig
from mamba_core.config import BaseConfig, MambaConfig, preset
from mamba_core.sampling import Sampling
from mamba_core.spec import ops
from mamba_core.spec.init import initial_values
from mamba_core.spec.reference import ReferenceModel
from mamba_core.tasks.lm import cross_entropy

# Of the works that are an op: its name.
OPS = {"scan": "selective_scan", "ssd": "ssd"}
# In the order of an op's arguments, results and gradients.
ARGUMENTS = {"selective_scan": ("x", "delta", "A", "B", "C", "D"), "ssd": ("x", "dt", "A", "B", "C", "D")}
# Tokens that one call decodes: JAX hands them out in blocks of as many.
DECODED = 16
GREEDY = Sampling()
# Beyond, the reference would take minutes and gigabytes; candidates are then compared with each other.
LONGEST_REFERENCE = 2048
MOST_STATES = 2**27  # that it keeps of a layer, one a position

WORKS = {
    "scan": "selective scan, forward",
    "scan-gradient": "selective scan, forward and backward",
    "ssd": "recurrence of Mamba-2, forward",
    "ssd-gradient": "recurrence of Mamba-2, forward and backward",
    "forward": "model, logits of all positions",
    "prefill": "model, logits after a prompt",
    "decode": "model, one token after another, each",
    "block": "residual block, forward and backward",
    "training": "model, loss and gradients",
}


@dataclass(frozen=True)
class Case:
    """Something to time.

    Attributes:
        group: the table of the report that it belongs to.
        work: a key of WORKS.
        config: the model's, or that of the block around the op, whose sizes are those of its state.
        length: positions; of the prompt where tokens are decoded. The batch is 1.
        dtype: the compute dtype.
        peers: names in `peers.PEERS`.
        baseline: the candidate that the others are compared with; "" for none.
        floor: a name in `floors.FLOORS`, what no candidate could beat; "" for none.
        left_out: kernels of ours that would take minutes and gigabytes.
        remat: whether a gradient computes the blocks again instead of keeping them.
    """

    name: str
    group: str
    work: str
    config: BaseConfig
    length: int
    dtype: str = "float32"
    peers: tuple[str, ...] = ()
    baseline: str = ""
    floor: str = ""
    left_out: tuple[str, ...] = ()
    remat: bool = False

    @property
    def op(self) -> str | None:
        """The name of the op that is timed alone; None for a model or a block."""
        return OPS.get(self.work.removesuffix("-gradient"))

    @property
    def differentiated(self) -> bool:
        """Whether it is an op with its gradients."""
        return self.work.endswith("-gradient")

    @property
    def state(self) -> tuple[int, ...]:
        """The sizes of the recurrence's state in a layer."""
        return next(field.shape for field in self.config.facts.fields[0] if field.name == "ssm")

    @property
    def title(self) -> str:
        if self.op is not None:
            sizes = ", ".join(map(str, (1, self.length, *self.state)))
            return f"{WORKS[self.work]}, ({sizes}) {self.dtype}"
        layers = f"{self.config.n_layer} layer{'s' * (self.config.n_layer > 1)} of width {self.config.d_model}"
        recomputed = ", blocks recomputed" if self.remat else ""
        return f"{WORKS[self.work]}, {layers}, {self.length} positions, {self.dtype}{recomputed}"

    @property
    def parts(self) -> int:
        """How many of what is reported a call computes."""
        return DECODED if self.work == "decode" else 1

    @property
    def comparable(self) -> bool:
        """Whether the reference can say what is right."""
        return self.length <= LONGEST_REFERENCE and self.length * math.prod(self.state) <= MOST_STATES


def smaller(case: Case) -> Case:
    """The case for a quick run, of a size that shows that all works, and little more."""
    sizes = {"n_layer": min(case.config.n_layer, 2), "vocab_size": min(case.config.vocab_size, 1000)}
    return dataclasses.replace(case, config=dataclasses.replace(case.config, **sizes), length=case.length // 8)


def op_inputs(case: Case) -> dict[str, np.ndarray]:
    """The op's ARGUMENTS and dy in float32, of the size that they have in a model that was just initialised."""
    rng = np.random.default_rng(0)
    values = (_ssd_inputs if case.op == "ssd" else _scan_inputs)(case, rng)
    return {name: value.astype(np.float32) for name, value in values.items()}


def _scan_inputs(case: Case, rng: np.random.Generator) -> dict[str, np.ndarray]:
    length, channels, states = case.length, case.config.d_inner, case.config.d_state
    return {
        "x": rng.normal(size=(1, length, channels)),
        "delta": _steps(case, rng, channels),
        "A": -np.tile(np.arange(1.0, states + 1), (channels, 1)),
        "B": rng.normal(size=(1, length, states)),
        "C": rng.normal(size=(1, length, states)),
        "D": rng.normal(size=channels),
        "dy": rng.normal(size=(1, length, channels)),
    }


def _ssd_inputs(case: Case, rng: np.random.Generator) -> dict[str, np.ndarray]:
    length, groups, (heads, channels, states) = case.length, case.config.ngroups, case.state
    return {
        "x": rng.normal(size=(1, length, heads, channels)),
        "dt": _steps(case, rng, heads),
        "A": -rng.uniform(*case.config.A_init_range, heads),
        "B": rng.normal(size=(1, length, groups, states)),
        "C": rng.normal(size=(1, length, groups, states)),
        "D": rng.normal(size=heads),
        "dy": rng.normal(size=(1, length, heads, channels)),
    }


def _steps(case: Case, rng: np.random.Generator, count: int) -> np.ndarray:
    return np.exp(rng.uniform(np.log(case.config.dt_min), np.log(case.config.dt_max), (1, case.length, count)))


def tokens(case: Case, more: int = 0) -> np.ndarray:
    """(1, length + more) int32."""
    return np.random.default_rng(0).integers(0, case.config.vocab_size, (1, case.length + more)).astype(np.int32)


def block_inputs(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """The block's input and the gradient of its output, (1, length, d_model) float32 each."""
    x, dy = np.random.default_rng(0).normal(size=(2, 1, case.length, case.config.d_model)).astype(np.float32)
    return x, dy


def expected(case: Case) -> list[np.ndarray] | None:
    """What a candidate's first call must give, as the reference computes it; None where that would take too long."""
    # The dtype rounds the candidates' results, not the reference's.
    return _expected(dataclasses.replace(case, name="", dtype="float32")) if case.comparable else None


@functools.lru_cache(maxsize=1)
def _expected(case: Case) -> list[np.ndarray]:
    return REFERENCES[case.work](case)


def _op(case):
    inputs, names, op = op_inputs(case), ARGUMENTS[case.op], ops.public()[case.op]
    arguments = [inputs[name] for name in names]
    gradients = op.vjp(inputs["dy"], None, *arguments) if case.differentiated else {}
    return [op.forward(*arguments), *(gradients[name] for name in names if gradients)]


def _model(case) -> ReferenceModel:
    return ReferenceModel(case.config, dict(initial_values(case.config)))


def _forward(case):
    return [_model(case)(tokens(case)).logits]


def _prefill(case):
    return [_forward(case)[0][:, -1, : case.config.vocab_size]]


def _decode(case):
    model, given, found = _model(case), tokens(case), []
    logits, state = model(given)
    for _ in range(DECODED):
        last = logits[:, -1, : case.config.vocab_size]
        chosen = last.argmax(-1)
        found.append(last.max(-1) - np.log(np.exp(last).sum(-1)))
        logits, state = model(chosen[:, None], state)
    return [np.stack(found)]


def _block(case):
    model, (x, dy) = _model(case), block_inputs(case)
    return [model(x).hidden, model.vjp(dy, x)[0]["inputs_embeds"]]


def _training(case):
    model, given = _model(case), tokens(case, more=1)
    loss, dlogits = cross_entropy(model(given[:, :-1]).logits, given[:, 1:])
    gradients, _ = model.vjp(dlogits, given[:, :-1])
    return [np.array(loss), *(gradients[name] for name in sorted(gradients))]


REFERENCES = {
    **dict.fromkeys(("scan", "scan-gradient", "ssd", "ssd-gradient"), _op),
    "forward": _forward,
    "prefill": _prefill,
    "decode": _decode,
    "block": _block,
    "training": _training,
}

_BASE = preset("mamba-130m")
_BLOCK = dataclasses.replace(_BASE, n_layer=1, task="layers")
# 298 million parameters, of which a token reads 132 million.
_JAMBA = JambaConfig(
    d_model=768, n_layer=8, d_intermediate=2048, num_heads=12, num_kv_heads=4, num_experts=8, bos_token_id=1,
    eos_token_id=2, pad_token_id=0,
)  # fmt: skip
_SCALED = MambaConfig(d_model=256, n_layer=4, vocab_size=256)
LENGTHS = tuple(2**power for power in range(7, 18))
# Not for long sequences: their backward is of the square of the length, or seconds for each hundred positions.
_SLOW_SCANS = ("mambapy sequential", "transformers", "mamba_ssm", "minimamba")
_KEPT = "mambapy, memory kept"
_SCANS = ("mambapy", _KEPT, "JAX associative_scan", "MLX loop")


def _cases():
    for name, length, scans in (("scan", 2048, _SCANS), ("scan-short", 256, _SCANS + _SLOW_SCANS)):
        settings = {"config": _BASE, "length": length, "peers": scans, "baseline": "mambapy"}
        yield Case(f"{name}-forward", name, "scan", floor="arithmetic", **settings)
        yield Case(f"{name}-gradient", name, "scan-gradient", **settings)
    for dtype, baseline, others in (
        ("float32", "mambapy", ("transformers", "minimamba")),
        ("bfloat16", "transformers", ()),  # mambapy and MiniMamba cannot run in it
    ):
        settings = {"config": _BASE, "dtype": dtype, "baseline": baseline}
        yield Case(f"prefill-{dtype}", "model", "prefill", length=512, peers=(baseline, *others), **settings)
        # MiniMamba's decoding fails at its first step.
        decoding = tuple(peer for peer in (baseline, *others) if peer != "minimamba")
        yield Case(f"decode-{dtype}", "model", "decode", length=16, peers=decoding, floor="weights", **settings)
    yield from _mamba2_cases()
    for dtype in ("float32", "bfloat16"):
        theirs = {"peers": ("transformers",), "baseline": "transformers"}
        yield Case(f"jamba-prefill-{dtype}", "jamba", "prefill", _JAMBA, 512, dtype, **theirs)
        yield Case(f"jamba-decode-{dtype}", "jamba", "decode", _JAMBA, 16, dtype, **theirs)
    yield Case("block", "training", "block", _BLOCK, 512, peers=("mambapy", _KEPT), baseline="mambapy")
    for work in ("forward", "training"):
        for length in LENGTHS:
            yield Case(f"scaling-{work}-{length}", "scaling", work, _SCALED, length, remat=work == "training")


def _mamba2_cases():
    base, theirs = preset("mamba2-130m"), {"peers": ("transformers",), "baseline": "transformers"}
    yield Case("ssd-forward", "mamba2", "ssd", base, 2048, floor="products", **theirs)
    yield Case("ssd-gradient", "mamba2", "ssd-gradient", base, 2048, left_out=("sequential",), **theirs)
    block = dataclasses.replace(base, n_layer=1, task="layers")
    yield Case("mamba2-block", "mamba2", "block", block, 2048, **theirs)
    for dtype in ("float32", "bfloat16"):
        yield Case(f"mamba2-prefill-{dtype}", "mamba2", "prefill", base, 512, dtype, **theirs)
        yield Case(f"mamba2-decode-{dtype}", "mamba2", "decode", base, 16, dtype, floor="weights", **theirs)


CASES = {case.name: case for case in _cases()}
# The short scan has all the candidates of the long one, and of the scaling one length shows that it runs.
QUICK = tuple(
    name
    for name, case in CASES.items()
    if case.group != "scan" and not (case.group == "scaling" and case.length > LENGTHS[0])
)


def choose(names: list[str] | None, quick: bool = False) -> list[Case]:
    """The cases of these names or groups, all by default.

    Raises:
        ValueError: an unknown name.
    """
    groups = dict.fromkeys(case.group for case in CASES.values())
    known = {*CASES, *groups}
    if unknown := [name for name in names or () if name not in known]:
        raise ValueError(f"no case {unknown[0]!r}; see mamba-core bench --list; groups are {', '.join(groups)}")
    chosen = [case for case in CASES.values() if not names or case.name in names or case.group in names]
    if not quick:
        return chosen
    kept = [smaller(case) for case in chosen if case.name in QUICK]
    if not kept:
        raise ValueError(f"--quick runs none of {', '.join(names)}, only {', '.join(QUICK)}; leave it out")
    return kept
