"""Systems written elsewhere, each imported when it is used: their own code, called on our inputs and weights.

"memory kept" is the same with an allocator that gives nothing back to the system: large arrays come from it anew at
every call otherwise, and that can take longer than what is computed in them.
Two are what one would write oneself: `jax.lax.associative_scan` over the (b, l, e, n) decays and increments, and a loop
over positions in MLX.
"""

import ctypes
import dataclasses
import importlib
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from itertools import islice
from types import ModuleType
from unittest import mock

import numpy as np

import mamba_core as mc
from mamba_core.benchmarks import frameworks
from mamba_core.benchmarks.cases import DECODED, Case, tokens
from mamba_core.benchmarks.frameworks import Timed
from mamba_core.spec import state as states
from mamba_core.spec.init import initial_values

# mallopt's M_MMAP_MAX and M_TRIM_THRESHOLD: no array of its own mapping, and no end of the heap too long.
GLIBC_KEEPS = ((-4, 0), (-1, -1))


def mambapy(case: Case, *, sequential: bool = False) -> Timed:
    """By its parallel scan, or by its loop."""
    import torch
    from mambapy import mamba

    config = mamba.MambaConfig(
        d_model=case.config.d_model,
        n_layers=case.config.n_layer,
        d_state=case.config.d_state,
        expand_factor=case.config.expand,
        d_conv=case.config.d_conv,
        pscan=not sequential,
    )
    if case.op is not None:
        block = mamba.MambaBlock(config)
        return frameworks.torch_op(block.selective_scan_seq if sequential else block.selective_scan, case)
    if case.work == "block":
        block = _filled(mamba.ResidualBlock(config), _torch_values(case, {"backbone.layers.0.": ""}))
        return frameworks.torch_block(block, block.parameters(), case)
    # It imports Triton, for Mamba-2 only.
    stubs = ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton", "mamba_ssm.ops.triton.ssd_combined")
    lm = _import_with("mambapy.lm", {name: mock.MagicMock() for name in stubs})
    names = {"backbone.embeddings": "embedding", "backbone.norm_f": "norm_f", "backbone.layers": "mamba.layers"}
    values = _torch_values(case, names)
    values["lm_head.weight"] = values["embedding.weight"]
    model = _filled(lm.LM(config, case.config.vocab_size, case.config.pad_vocab_size_multiple), values)
    if case.work == "prefill":
        return frameworks.torch_forward(lambda ids: model(ids)[:, -1, : case.config.vocab_size], case)

    def begin(ids):
        caches = [(None, torch.zeros(1, case.config.d_inner, case.config.d_conv - 1)) for _ in model.mamba.layers]
        for token in ids.unbind(1):
            logits, caches = model.step(token, caches)
        return logits, caches

    return _torch_decode(begin, model.step, case)


def transformers(case: Case) -> Timed:
    """Its path without CUDA, which is plain torch."""
    theirs = importlib.import_module("transformers")
    theirs.logging.set_verbosity_error()
    if case.op is not None:
        return frameworks.torch_op(_transformers_op(case), case)
    import torch

    if case.work == "block":
        module = importlib.import_module("transformers.models.mamba2.modeling_mamba2")
        block = module.Mamba2Block(_transformers_config(theirs, case), 0)
        block = _filled(block, _torch_values(case, {"backbone.layers.0.": ""}))
        return frameworks.torch_block(block, block.parameters(), case)
    with tempfile.TemporaryDirectory() as folder:
        mc.save(mc.build(case.config, backend="torch", dtype=case.dtype, device="cpu"), folder)
        model = theirs.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, case.dtype)).eval()
    if case.work == "prefill":

        def last(ids):
            return model(ids, use_cache=True, logits_to_keep=1).logits[:, -1, : case.config.vocab_size]

        return frameworks.torch_forward(last, case)

    name = "past_key_values" if states.grows(case.config) else "cache_params"

    def begin(ids):
        out = model(ids, use_cache=True)
        return out.logits[:, -1], out[name]

    def advance(token, cache):
        out = model(token[:, None], use_cache=True, **{name: cache})
        return out.logits[:, -1], out[name]

    return _torch_decode(begin, advance, case)


def _transformers_config(theirs: ModuleType, case: Case):
    fields = dataclasses.replace(case.config, task="lm").to_hf()  # of which a block is a part
    fields.pop("time_step_limit", None)  # none is its default too, and has another form in a file
    return theirs.AutoConfig.for_model(fields.pop("model_type"), **fields)


def _transformers_op(case: Case) -> Callable:
    if case.op == "ssd":
        module = importlib.import_module("transformers.models.mamba2.modeling_mamba2")
        return lambda *arguments: module.mamba2_chunk_scan(*arguments[:5], case.config.chunk_size, arguments[5])
    module = importlib.import_module("transformers.models.mamba.modeling_mamba")
    return partial(_channels_first, module.mamba_selective_scan)


def mamba_ssm(case: Case) -> Timed:
    """Its reference function, which runs without CUDA; its packages import Triton and CUDA's scan wherever entered."""
    if (spec := find_spec("mamba_ssm")) is None:
        raise ModuleNotFoundError("No module named 'mamba_ssm'", name="mamba_ssm")
    stubs = {name: mock.MagicMock() for name in ("selective_scan_cuda", "mamba_ssm.ops.triton.layer_norm")}
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.utils"):
        stubs[name] = ModuleType(name)
        stubs[name].__path__ = ["/".join([*spec.submodule_search_locations, *name.split(".")[1:]])]
    theirs = _import_with("mamba_ssm.ops.selective_scan_interface", stubs)
    return frameworks.torch_op(partial(_channels_first, theirs.selective_scan_ref), case)


def minimamba(case: Case) -> Timed:
    """Its model is not Mamba (see the README) but takes as long; its scan is Mamba's, with a gate of one."""
    import torch

    theirs = importlib.import_module("minimamba")
    fields = {field.name for field in dataclasses.fields(theirs.MambaLMConfig)}
    same = {name: value for name, value in dataclasses.asdict(case.config).items() if name in fields}
    config = theirs.MambaLMConfig(**same | {"dt_rank": case.config.dt_rank_size, "device": "cpu"})
    if case.work == "prefill":
        model = theirs.MambaForCausalLM(config).eval()
        return frameworks.torch_forward(model, case, same=False)
    scan = importlib.import_module("minimamba.s6").S6(config)._selective_scan_forward
    gate = torch.ones(1, case.length, case.config.d_inner)
    return frameworks.torch_op(lambda *arguments: scan(*arguments, gate), case)


def jax_associative_scan(case: Case) -> Timed:
    from jax import lax
    from jax import numpy as jnp

    def join(left, right):
        return left[0] * right[0], right[0] * left[1] + right[1]

    def scan(x, delta, A, B, C, D):
        decay = jnp.exp(delta[..., None] * A)
        increment = (delta * x)[..., None] * B[:, :, None]
        _, h = lax.associative_scan(join, (decay, increment), axis=1)
        return jnp.einsum("blen,bln->ble", h, C) + D * x

    return frameworks.jax_op(scan, case)


def mlx_loop(case: Case) -> Timed:
    import mlx.core as mx

    def scan(x, delta, A, B, C, D):
        h, outputs = mx.zeros((x.shape[0], *A.shape)), []
        for t in range(x.shape[1]):
            increment = (delta[:, t] * x[:, t])[..., None] * B[:, t, None]
            h = mx.exp(delta[:, t, :, None] * A) * h + increment
            outputs.append((h @ C[:, t, :, None])[..., 0])
        return mx.stack(outputs, axis=1) + D * x

    return frameworks.mlx_op(scan, case)


def keeping_memory(make: Callable, case: Case) -> Timed:
    """Made after the C library was told to serve all sizes from its heap and to keep that.

    Raises:
        ImportError: it is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not all(mallopt(name, value) for name, value in GLIBC_KEEPS):
        raise ImportError("the C library is not glibc, whose allocator can be told to keep memory")
    return make(case)


PEERS = {
    "mambapy": mambapy,
    "mambapy, memory kept": partial(keeping_memory, mambapy),
    "mambapy sequential": partial(mambapy, sequential=True),
    "transformers": transformers,
    "mamba_ssm": mamba_ssm,
    "minimamba": minimamba,
    "JAX associative_scan": jax_associative_scan,
    "MLX loop": mlx_loop,
}


def _torch_decode(begin, advance, case: Case) -> Timed:
    """begin(ids) and advance(token, cache) -> logits (1, v), cache."""
    import torch

    def decode():
        logits, cache = begin(torch.from_numpy(tokens(case)).long())
        while True:
            logprobs = logits[:, : case.config.vocab_size].float().log_softmax(-1)
            logprob, token = logprobs.max(-1)
            yield logprob
            logits, cache = advance(token, cache)

    decoding = decode()

    @torch.inference_mode()
    def call():
        return list(islice(decoding, DECODED))

    return Timed(call, lambda logprobs: [np.stack(frameworks.torch_arrays(logprobs))])


def _torch_values(case: Case, names: dict[str, str]) -> dict:
    """The initial values by their names: canonical prefix -> theirs."""
    import torch

    def rename(name):
        for ours, theirs in names.items():
            if name.startswith(ours):
                return theirs + name.removeprefix(ours)
        return name

    return {rename(name): torch.from_numpy(np.array(value)) for name, value in initial_values(case.config)}


def _filled(model, values):
    model.load_state_dict(values, strict=True)
    return model


def _channels_first(scan, x, delta, A, B, C, D):
    return scan(x.mT, delta.mT, A, B.mT, C.mT, D).mT


def _import_with(name: str, stubs: dict) -> ModuleType:
    """The module, with others that its import asks for and its CPU functions do not use; they do not stay."""
    sys.modules.update(stubs)
    try:
        return importlib.import_module(name)
    finally:
        for stub in stubs:
            del sys.modules[stub]
