"""Mamba-1 (Gu and Dao 2023, section 3.4 and figure 3): its parameter table and its block graph."""

from collections.abc import Iterator

from mamba_core.config import MambaConfig
from mamba_core.spec.graph import Node
from mamba_core.spec.init import constant, log_arange, normal, ones, step_bias, uniform, zeros
from mamba_core.spec.params import Parameter

EMBEDDING = "backbone.embeddings.weight"


def parameters(config: MambaConfig) -> Iterator[Parameter]:
    """Initial values as mamba_ssm's (modules/mamba_simple.py and models/mixer_seq_simple.py)."""
    d, v = config.d_model, config.padded_vocab_size
    if config.task != "layers":
        yield Parameter(EMBEDDING, "vd", (v, d), normal(config.initializer_range), mup_role="input")
    for layer in range(config.n_layer):
        yield from _layer_parameters(f"backbone.layers.{layer}.", config)
    if config.task != "layers":
        yield Parameter("backbone.norm_f.weight", "d", (d,), ones, decay=False)
    if config.task == "lm" and not config.tie_embeddings:
        yield Parameter("lm_head.weight", "vd", (v, d), uniform(d**-0.5), mup_role="output")


def _layer_parameters(prefix: str, config: MambaConfig) -> Iterator[Parameter]:
    d, e, n, k, r = config.d_model, config.d_inner, config.d_state, config.d_conv, config.dt_rank_size
    mixer = prefix + "mixer."
    step_scale = config.dt_scale * r**-0.5
    step_weight = uniform(step_scale) if config.dt_init == "random" else constant(step_scale)
    out_scale = config.n_layer**-0.5 if config.rescale_prenorm_residual else 1.0
    step = step_bias(config.dt_min, config.dt_max, config.dt_init_floor)
    yield Parameter(prefix + "norm.weight", "d", (d,), ones, decay=False)
    yield Parameter(mixer + "A_log", "en", (e, n), log_arange, float32=True, decay=False)
    yield Parameter(mixer + "D", "e", (e,), ones, float32=True, decay=False)
    yield Parameter(mixer + "in_proj.weight", "ed", (2 * e, d), uniform(d**-0.5), mup_role="hidden")
    if config.bias:
        yield Parameter(mixer + "in_proj.bias", "e", (2 * e,), zeros, decay=False)
    yield Parameter(mixer + "conv1d.weight", "e1k", (e, 1, k), uniform(k**-0.5), mup_role="vector")
    if config.conv_bias:
        yield Parameter(mixer + "conv1d.bias", "e", (e,), uniform(k**-0.5), decay=False)
    yield Parameter(mixer + "x_proj.weight", "re", (r + 2 * n, e), uniform(e**-0.5), mup_role="hidden")
    yield Parameter(mixer + "dt_proj.weight", "er", (e, r), step_weight, mup_role="hidden")
    yield Parameter(mixer + "dt_proj.bias", "e", (e,), step, float32=True, decay=False)
    out = uniform(out_scale * e**-0.5)
    yield Parameter(mixer + "out_proj.weight", "de", (d, e), out, mup_role="hidden")
    if config.bias:
        yield Parameter(mixer + "out_proj.bias", "d", (d,), zeros, decay=False)


def graph(config: MambaConfig) -> Iterator[Node]:
    residual = "inputs_embeds"
    if config.task != "layers":
        residual = "embedding"
        yield Node("embedding", "embedding", ("input_ids",), {"weight": EMBEDDING})
    for layer in range(config.n_layer):
        yield from _layer_graph(layer, residual, config)
        residual = f"layers.{layer}.residual"
    if config.task == "layers":
        yield Node("hidden", "masked", (residual,))
        return
    eps = {"eps": config.norm_eps}
    yield Node("norm_f", "rms_norm", (residual,), {"weight": "backbone.norm_f.weight"}, eps)
    if config.task == "features":
        yield Node("hidden", "masked", ("norm_f",))
        return
    yield Node("logits", "head", ("norm_f",), {"weight": EMBEDDING if config.tie_embeddings else "lm_head.weight"})


def _layer_graph(layer: int, residual: str, config: MambaConfig) -> Iterator[Node]:
    e, n, r = config.d_inner, config.d_state, config.dt_rank_size
    here, weights = f"layers.{layer}.", f"backbone.layers.{layer}."
    mixer = weights + "mixer."

    def linear(name, source, bias=False):
        names = {"weight": f"{mixer}{name}.weight"} | ({"bias": f"{mixer}{name}.bias"} if bias else {})
        return Node(here + name, "linear", (here + source,), names)

    def columns(name, source, start, stop):
        return Node(here + name, "columns", (here + source,), settings={"start": start, "stop": stop})

    eps = {"eps": config.norm_eps}
    yield Node(here + "norm", "rms_norm", (residual,), {"weight": weights + "norm.weight"}, eps)
    yield linear("in_proj", "norm", config.bias)
    yield columns("x", "in_proj", 0, e)
    yield columns("z", "in_proj", e, 2 * e)
    taps = {"weight": mixer + "conv1d.weight"} | ({"bias": mixer + "conv1d.bias"} if config.conv_bias else {})
    yield Node(here + "conv", "causal_conv", (here + "x",), taps, {"activation": "silu"}, (layer, "conv"))
    yield linear("x_proj", "conv")
    yield columns("dt", "x_proj", 0, r)
    yield columns("B", "x_proj", r, r + n)
    yield columns("C", "x_proj", r + n, r + 2 * n)
    # The bias of dt_proj enters in float32 inside the scan, before the softplus.
    yield linear("dt_proj", "dt")
    names = {"A_log": mixer + "A_log", "D": mixer + "D", "delta_bias": mixer + "dt_proj.bias"}
    inputs = tuple(here + name for name in ("conv", "dt_proj", "B", "C", "z"))
    if config.compat == "minimamba":
        yield Node(here + "scan", "selective_scan", inputs[:-1], names, {"delta_bias_factor": 2}, (layer, "ssm"))
        yield Node(here + "gate", "multiply", (here + "scan", here + "z"))
        yield linear("out_proj", "gate", config.bias)
    else:
        yield Node(here + "scan", "selective_scan", inputs, names, state=(layer, "ssm"))
        yield linear("out_proj", "scan", config.bias)
    yield Node(here + "residual", "add", (residual, here + "out_proj"))
