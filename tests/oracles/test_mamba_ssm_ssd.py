"""Against mamba_ssm's Mamba-2, run on the CPU in float64: its three plain forms of the recurrence, and its layer.

Each is used where it is right. `ssd_minimal_discrete` has whole chunks and takes steps ready made;
`selective_state_update_ref` has no limit; `ssd_selective_scan`, one Mamba-1 scan a head, has all but a carried state.
The layer runs with that scan and with `rms_norm_ref`, in place of the Triton kernels that they stand for in theirs.
"""

import dataclasses
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mamba_core as mc
from mamba_core.architectures.mamba2 import Mamba2Config
from mamba_core.spec.init import initial_values
from mamba_core.spec.ops import ssd as ssd_spec
from mamba_core.spec.reference import ReferenceModel
from mamba_core.spec.tolerances import relative_l2, tolerance
from mamba_core.weights.io import open_checkpoint
from mamba_core.weights.writing import write_model

from .mamba_ssm_files import importable, imported, in_float64

torch = pytest.importorskip("torch")
pytest.importorskip("einops")

BATCH, LENGTH = 2, 24
NAMES = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")


@pytest.fixture(scope="module")
def ssd_minimal_discrete():
    return imported("modules.ssd_minimal").ssd_minimal_discrete


@pytest.fixture(scope="module")
def selective_state_update_ref():
    return imported("ops.triton.selective_state_update").selective_state_update_ref


@pytest.fixture(scope="module")
def ssd_selective_scan():
    """Theirs; it enters the scan of Mamba-1, whose CUDA kernel is replaced by its reference."""
    theirs, interface = imported("ops.triton.ssd_combined"), imported("ops.selective_scan_interface")
    interface.selective_scan_fn = interface.selective_scan_ref
    theirs.torch = SimpleNamespace(float32=torch.float64)  # to which it rounds the rates, whatever the rest is in

    def scan(*args, **kwargs):
        with importable(ops__selective_scan_interface=interface):
            return in_float64(theirs.ssd_selective_scan, *args, **kwargs)

    return scan


def draw(seed, shape=(4, 3, 2, 5), length=LENGTH):
    """shape: (heads, channels of a head, groups, states)."""
    h, p, g, n = shape
    rng = np.random.default_rng(seed)
    sizes = {"x": (BATCH, length, h, p), "dt": (BATCH, length, h), "A": (h,), "B": (BATCH, length, g, n)}
    sizes |= {"C": (BATCH, length, g, n), "D": (h,), "z": (BATCH, length, h, p), "dt_bias": (h,)}
    arrays = {name: rng.normal(size=size) for name, size in sizes.items()}
    return arrays | {"A": -np.exp(arrays["A"]), "dt": np.abs(arrays["dt"])}


def tensors_of(arrays):
    return {name: torch.from_numpy(np.array(value)) for name, value in arrays.items()}


SHAPES = st.sampled_from([(4, 3, 2, 5), (2, 1, 1, 1), (6, 2, 6, 3), (6, 4, 3, 2)])


# --- whole sequences -------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 2**32),
    shape=SHAPES,
    softplus=st.booleans(),
    limit=st.sampled_from([(0.0, float("inf")), (0.05, 0.3)]),
    absent=st.sets(st.sampled_from(["D", "z", "dt_bias"])),
    wide=st.booleans(),
)
def test_reference_equals_ssd_selective_scan(ssd_selective_scan, seed, shape, softplus, limit, absent, wide):
    arrays = {name: value for name, value in draw(seed, shape).items() if name not in absent}
    if not softplus and "dt_bias" in arrays:  # a step that is negative is 0 in ours, and in their kernel
        arrays["dt_bias"] = np.abs(arrays["dt_bias"])
    if wide and "D" in arrays:  # one a channel
        arrays["D"] = np.random.default_rng(1).normal(size=shape[:2])
    options = {"dt_softplus": softplus, "dt_limit": limit}
    expected = ssd_selective_scan(**tensors_of(arrays), **options).numpy()
    np.testing.assert_allclose(ssd_spec.ssd(**arrays, **options), expected, rtol=1e-11, atol=1e-12)


@given(seed=st.integers(0, 2**32), shape=SHAPES, chunk=st.sampled_from([1, 4, 8, 24]), carried=st.booleans())
def test_reference_equals_ssd_minimal_discrete(ssd_minimal_discrete, seed, shape, chunk, carried):
    arrays = {name: value for name, value in draw(seed, shape).items() if name in ("x", "dt", "A", "B", "C")}
    h, p, g, n = shape
    state = np.random.default_rng(1).normal(size=(BATCH, h, p, n)) if carried else None
    y, final = ssd_spec.ssd(**arrays, initial_state=state, return_final_state=True)
    given = tensors_of(arrays)
    B, C = (given[name].repeat_interleave(h // g, 2) for name in "BC")
    steps = given["dt"]
    begun = None if state is None else torch.from_numpy(state)[:, None]
    expected = ssd_minimal_discrete(given["x"] * steps[..., None], steps * given["A"], B, C, chunk, begun)
    np.testing.assert_allclose(y, expected[0].numpy(), rtol=1e-10, atol=1e-11)
    np.testing.assert_allclose(final, expected[1].numpy(), rtol=1e-10, atol=1e-11)


def their_gradients(ssd_selective_scan, arrays, dy, **options):
    tensors = {name: tensor.requires_grad_() for name, tensor in tensors_of(arrays).items()}
    ssd_selective_scan(**tensors, **options).backward(torch.from_numpy(dy))
    return {name: tensor.grad.numpy() for name, tensor in tensors.items()}


@pytest.mark.parametrize("limit", [(0.0, float("inf")), (0.5, 1.5)])
def test_gradient_equals_autograd_of_ssd_selective_scan(ssd_selective_scan, limit):
    arrays, options = draw(0), {"dt_softplus": True, "dt_limit": limit}
    dy = np.random.default_rng(1).normal(size=arrays["x"].shape)
    ours = ssd_spec.ssd_vjp(dy, None, **arrays, **options)
    for name, gradient in their_gradients(ssd_selective_scan, arrays, dy, **options).items():
        np.testing.assert_allclose(ours[name], gradient, rtol=1e-9, atol=1e-10, err_msg=name)


def stored(backend, arrays):
    """The backend's arrays in float32, and the same numbers in float64."""
    given = {name: backend.from_numpy(value, dtype="float32") for name, value in arrays.items()}
    return given, {name: backend.to_numpy(value).astype(np.float64) for name, value in given.items()}


@pytest.mark.parametrize("length", [1, 24, 129])
def test_backend_equals_ssd_selective_scan(ssd_selective_scan, backend, length):
    given, rounded = stored(backend, draw(length, (4, 8, 2, 16), length))
    options = {"dt_softplus": True, "dt_limit": (0.01, 2.0)}
    expected = ssd_selective_scan(**tensors_of(rounded), **options).numpy()
    kernels = backend.available_kernels()["ssd"]
    for kernel in ("auto", *(name for name, reason in kernels.items() if reason is None)):
        y = mc.ssd(**given, **options, kernel=kernel)
        assert relative_l2(backend.to_numpy(y), expected) <= tolerance("float32"), kernel


def test_backend_gradients_equal_ssd_selective_scan(ssd_selective_scan, backend):
    given, rounded = stored(backend, draw(0, (4, 8, 2, 16), 70))
    dy = np.random.default_rng(1).normal(size=rounded["x"].shape).astype(np.float32)

    def scan(*values):
        return (mc.ssd(**dict(zip(given, values, strict=True)), dt_softplus=True),)

    _, gradients = backend.vjp(scan, list(given.values()), [backend.from_numpy(dy, dtype="float32")])
    expected = their_gradients(ssd_selective_scan, rounded, dy.astype(np.float64), dt_softplus=True)
    for name, gradient in zip(given, gradients, strict=True):
        assert relative_l2(gradient, expected[name]) <= tolerance("float32", "gradient"), name


# --- one position ----------------------------------------------------------------------------------


def their_step(selective_state_update_ref, arrays, state):
    """Theirs has a value a channel, and updates the state in place."""
    tensors, state = tensors_of(arrays), torch.from_numpy(state.copy())
    p, n = state.shape[2:]
    tensors["A"] = tensors["A"][:, None, None].expand(-1, p, n)
    tensors["dt"] = tensors["dt"][..., None].expand(-1, -1, p)
    for name in ("D", "dt_bias"):
        tensors[name] = tensors[name][:, None].expand(-1, p)
    return selective_state_update_ref(state, **tensors, dt_softplus=True).numpy(), state.numpy()


def draw_step(seed, shape):
    h, p, _, n = shape
    arrays = {name: v[:, 0] if name in ("x", "dt", "B", "C", "z") else v for name, v in draw(seed, shape).items()}
    return arrays, np.random.default_rng(seed).normal(size=(BATCH, h, p, n))


@given(seed=st.integers(0, 2**32), shape=SHAPES)
def test_reference_step_equals_selective_state_update_ref(selective_state_update_ref, seed, shape):
    arrays, state = draw_step(seed, shape)
    y, after = ssd_spec.ssd_step(**arrays, dt_softplus=True, state=state)
    expected = their_step(selective_state_update_ref, arrays, state)
    np.testing.assert_allclose(y, expected[0], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(after, expected[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(4, 8, 2, 16), (24, 64, 1, 128)])
def test_backend_step_equals_selective_state_update_ref(selective_state_update_ref, backend, shape):
    arrays, state = draw_step(3, shape)
    given, rounded = stored(backend, arrays | {"state": state})
    y, after = mc.ssd_step(**given, dt_softplus=True)
    expected = their_step(selective_state_update_ref, rounded, rounded.pop("state"))
    assert relative_l2(backend.to_numpy(y), expected[0]) <= tolerance("float32")
    assert relative_l2(backend.to_numpy(after), expected[1]) <= tolerance("float32")


# --- the layer -------------------------------------------------------------------------------------

BASE = Mamba2Config(d_model=16, n_layer=1, vocab_size=17, d_state=5, headdim=4, task="layers", bias=True)
VARIANTS = {
    "base": {},
    "groups": {"ngroups": 4},
    "gate last": {"ngroups": 2, "norm_before_gate": True},
    "no norm": {"rmsnorm": False},
    "D of channels": {"D_has_hdim": True, "ngroups": 2},
    "some channels": {"d_ssm": 16, "ngroups": 2},
    "some channels, no norm": {"d_ssm": 20, "rmsnorm": False, "D_has_hdim": True},
    "limit": {"dt_limit": (0.01, 0.05), "conv_bias": False, "d_conv": 3},
}


@pytest.fixture(params=VARIANTS)
def config(request):
    return dataclasses.replace(BASE, **VARIANTS[request.param])


def their_layer(config, values, folder, ssd_selective_scan):
    """x -> x + mixer(norm(x)), with the weights that our checkpoint of a language model has under their names."""
    folder.mkdir()
    whole = dataclasses.replace(config, task="lm")
    outer = dict(initial_values(whole))
    write_model(folder, whole, outer | values, layout="mamba_ssm", dtype="float32")
    opened, layer = open_checkpoint(folder), "backbone.layers.0."
    tensors = {name.removeprefix(layer): torch.from_numpy(np.array(opened[name])) for name in opened}
    fields = dict(config.to_mamba_ssm()["ssm_cfg"]) if config.task == "lm" else whole.to_mamba_ssm()["ssm_cfg"]
    fields.pop("layer")
    theirs, norms = imported("modules.mamba2"), imported("ops.triton.layernorm_gated")
    mixer = theirs.Mamba2(config.d_model, **fields, use_mem_eff_path=False).double()
    own = {name.removeprefix("mixer."): value.double() for name, value in tensors.items() if name[:6] == "mixer."}
    mixer.load_state_dict(own, strict=True)
    if config.rmsnorm:
        norm = mixer.norm
        settings = {"eps": norm.eps, "group_size": norm.group_size, "norm_before_gate": norm.norm_before_gate}
        norm.forward = lambda y, z: norms.rms_norm_ref(y, norm.weight, norm.bias, z, **settings)

    def scan(x, dt, A, B, C, chunk_size, *, seq_idx, cu_seqlens, return_final_states, return_varlen_states, **more):
        return ssd_selective_scan(x, dt, A, B, C, **more)

    def layer_of(x):
        with mock.patch.object(theirs, "mamba_chunk_scan_combined", scan):
            hidden = norms.rms_norm_ref(x, tensors["norm.weight"].double(), None, eps=1e-5, upcast=False)
            return x + in_float64(mixer, hidden)

    return layer_of, mixer


@pytest.fixture
def values(config):
    """Initial values moved off zero and one, which would hide a parameter that is not used."""
    rng = np.random.default_rng(7)
    moved = {name: value + 0.1 * rng.normal(size=value.shape) for name, value in initial_values(config, 3)}
    return {name: value.astype(np.float32) for name, value in moved.items()}


def test_reference_equals_the_layer(config, values, tmp_path, ssd_selective_scan):
    layer, mixer = their_layer(config, values, tmp_path / "ours", ssd_selective_scan)
    x, dy = np.random.default_rng(0).normal(size=(2, BATCH, LENGTH, config.d_model))
    given = torch.from_numpy(x).requires_grad_()
    expected = layer(given)
    model = ReferenceModel(config, values)
    assert relative_l2(model(inputs_embeds=x).hidden, expected.detach().numpy()) <= 1e-12
    expected.backward(torch.from_numpy(dy))
    ours, _ = model.vjp(dy, inputs_embeds=x)
    assert relative_l2(ours["inputs_embeds"], given.grad.numpy()) <= 1e-10
    for name, parameter in mixer.named_parameters():
        gradient = ours[f"backbone.layers.0.mixer.{name}"]
        assert relative_l2(parameter.grad.numpy(), gradient) <= 1e-10, name
