"""Against mamba_ssm's own hybrids, on the CPU in float64: its model, blocks, attention and feed-forwards.

What it takes from compiled packages is replaced: the scan by its reference function, the fused norm by PyTorch's, and
flash-attn's rotary embedding by a product of complex numbers.
"""

import dataclasses
import importlib
import json
from types import ModuleType
from unittest import mock

import numpy as np
import pytest

from mamba_core.architectures.mamba import MambaConfig
from mamba_core.config import preset
from mamba_core.spec.init import initial_values
from mamba_core.spec.params import parameter_table
from mamba_core.spec.reference import ReferenceModel
from mamba_core.spec.tolerances import relative_l2
from mamba_core.weights.opening import open_model
from mamba_core.weights.writing import write_model

from .mamba_ssm_files import importable, imported, in_float64

torch = pytest.importorskip("torch")
pytest.importorskip("einops")

BASE = MambaConfig(
    d_model=16, n_layer=3, vocab_size=32, d_state=4, initializer_range=0.3, attn_layer_idx=(1,), attn_cfg={
        "num_heads": 4, "causal": True,
    },
)  # fmt: skip


def with_attention(**changes):
    return {"attn_cfg": dict(BASE.attn_cfg) | changes}


VARIANTS = {
    "base": {},
    "feed-forward": {"d_intermediate": 100},
    "feed-forward alone": {"d_intermediate": 128, "attn_layer_idx": (), "tie_embeddings": False},
    "grouped": with_attention(num_heads_kv=2, head_dim=6, qkv_proj_bias=False, out_proj_bias=False, softmax_scale=0.7),
    "convolution": with_attention(d_conv=3),
    "rotary": with_attention(rotary_emb_dim=4, d_conv=4, num_heads_kv=1),
    "interleaved": with_attention(rotary_emb_dim=4, rotary_emb_base=100.0, rotary_emb_interleaved=True),
    "first and last": {"attn_layer_idx": (0, 2), "d_intermediate": 5, "bias": True},
}


class Rotary(torch.nn.Module):
    """flash_attn.layers.rotary.RotaryEmbedding's function of q (b, l, h, p) and kv (b, l, 2, g, p)."""

    def __init__(self, dim, base=10000.0, interleaved=False, device=None):
        super().__init__()
        self.dim, self.base, self.interleaved = dim, base, interleaved

    def turn(self, value):
        first, rest = value[..., : self.dim], value[..., self.dim :]
        halves = (-1, 2) if self.interleaved else (2, -1)
        pairs = first.unflatten(-1, halves)
        pairs = pairs if self.interleaved else pairs.transpose(-1, -2)
        count, step = (torch.arange(*ends, dtype=torch.float64) for ends in ((value.shape[1],), (0, self.dim, 2)))
        angles = torch.outer(count, self.base ** (-step / self.dim))
        turned = torch.view_as_complex(pairs.contiguous()) * torch.exp(1j * angles)[:, None]
        pairs = torch.view_as_real(turned)
        pairs = pairs if self.interleaved else pairs.transpose(-1, -2)
        return torch.cat((pairs.flatten(-2), rest), -1)

    def forward(self, q, kv, seqlen_offset=0, max_seqlen=None):
        assert seqlen_offset == 0
        return self.turn(q), torch.stack((self.turn(kv[:, :, 0]), kv[:, :, 1]), 2)


@pytest.fixture(scope="module")
def theirs():
    """Their module of models, with functions replaced. Of what it imports for generation and the hub there is none."""
    norms, generation, hub = (ModuleType(name) for name in ("layer_norm", "generation", "hf"))
    vars(norms).update(dict.fromkeys(("_layer_norm_fwd", "layer_norm_fn", "rms_norm_fn")), RMSNorm=torch.nn.RMSNorm)
    vars(generation).update(GenerationMixin=type("GenerationMixin", (), {}))
    vars(hub).update(dict.fromkeys(("load_config_hf", "load_state_dict_hf")))
    scan = imported("ops.selective_scan_interface").selective_scan_ref
    with importable(ops__triton__layer_norm=norms, utils__generation=generation, utils__hf=hub):
        models = importlib.import_module("mamba_ssm.models.mixer_seq_simple")
        mha, mamba = (importlib.import_module(f"mamba_ssm.modules.{name}") for name in ("mha", "mamba_simple"))
    with mock.patch.object(mha, "RotaryEmbedding", Rotary), mock.patch.object(mamba, "selective_scan_fn", scan):
        yield models


@pytest.fixture(params=VARIANTS)
def config(request):
    return dataclasses.replace(BASE, **VARIANTS[request.param])


@pytest.fixture
def ids():
    return np.random.default_rng(0).integers(0, BASE.vocab_size, (2, 19)).astype(np.int32)


def values_of(config):
    """Initial values moved off zero and one, which would hide a parameter that is not used; in float32 exactly."""
    rng = np.random.default_rng(7)
    moved = {name: value + 0.05 * rng.normal(size=value.shape) for name, value in initial_values(config, 3)}
    return {name: value.astype(np.float32) for name, value in moved.items()}


def written(folder, config, values):
    folder.mkdir()
    write_model(folder, config, values, layout="mamba_ssm", dtype="float32")
    return folder


def their_model(theirs, folder):
    """Their class from our files, strictly, without what is compiled, and with the residual stream in float64."""
    fields = json.loads((folder / "config.json").read_text()) | {"fused_add_norm": False, "residual_in_fp32": False}
    fields["ssm_cfg"] = fields["ssm_cfg"] | {"use_fast_path": False}
    model = theirs.MambaLMHeadModel(theirs.MambaConfig(**fields))
    model.load_state_dict(torch.load(folder / "pytorch_model.bin", weights_only=True))
    return model.double()


def test_reference_equals_their_model(theirs, config, ids, tmp_path):
    values = values_of(config)
    folder = written(tmp_path / "ours", config, values)
    model = their_model(theirs, folder)
    weights = np.random.default_rng(1).normal(size=(*ids.shape, config.padded_vocab_size))

    def run():
        logits = model(torch.from_numpy(ids).long()).logits
        (logits * torch.from_numpy(weights)).sum().backward()
        return logits.detach().numpy()

    ours, logits = ReferenceModel(config, values), in_float64(run)
    assert relative_l2(ours(ids).logits, logits) <= 1e-12
    expected, _ = ours.vjp(weights, ids)
    stored = open_model(folder).stored
    for name in parameter_table(config):
        (piece,) = stored[name].pieces
        theirs_of_name = piece.transform.read(model.get_parameter(piece.name).grad.numpy())
        assert relative_l2(theirs_of_name, expected[name]) <= 1e-10, name


def test_we_read_what_they_save(theirs, config, ids, tmp_path):
    model = their_model(theirs, written(tmp_path / "ours", config, values_of(config)))
    model.save_pretrained(tmp_path / "theirs")
    opened = open_model(tmp_path / "theirs")
    assert opened.layout == "mamba_ssm"
    assert opened.config.identity() == config.identity()
    with torch.no_grad():
        logits = in_float64(lambda: model(torch.from_numpy(ids).long()).logits).numpy()
    assert relative_l2(ReferenceModel(opened.config, dict(opened.tensors()))(ids).logits, logits) <= 1e-12


def test_mamba2attn_has_their_tensors(theirs):
    config = preset("mamba2attn-2.7b")
    fields = config.to_mamba_ssm()
    with torch.device("meta"), mock.patch.object(theirs, "_init_weights"):
        model = theirs.MambaLMHeadModel(theirs.MambaConfig(**fields | {"fused_add_norm": False}))
    found = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    expected = {name: entry.shape for name, entry in parameter_table(config).items()}
    expected["backbone.embedding.weight"] = expected["lm_head.weight"] = expected.pop("backbone.embeddings.weight")
    assert found == expected
