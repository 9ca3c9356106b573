"""Against mambapy.vim's blocks, and against mamba_ssm's recurrence twice with flips, in float64.

hustvl/Vim itself is no oracle on a CPU: without its fused kernels its mixer computes the forward direction alone, and
says nothing. Its interpolation of positions takes the first row for that of the class token, which stands in the
middle: `class_first` does the same, to begin where its fine-tuned models began.
"""

import dataclasses

import numpy as np
import pytest

import mamba_core as mc
from mamba_core.spec.images import positions
from mamba_core.spec.init import initial_values
from mamba_core.spec.reference import ReferenceModel
from mamba_core.spec.tolerances import relative_l2, tolerance

from .mamba_ssm_files import imported, in_float64

torch = pytest.importorskip("torch")
F = torch.nn.functional

BLOCKS = mc.VisionMambaConfig(d_model=12, n_layer=2, d_state=3, task="layers")
IMAGES = mc.VisionMambaConfig(
    d_model=12, n_layer=2, d_state=3, task_options={"image_size": 8, "patch_size": 4, "stride": 2, "num_classes": 5}
)
VARIANTS = {
    "base": {},
    "sum": {"divide_output": False},
    "sizes": {"d_conv": 3, "expand": 3, "dt_rank": 5, "bias": True, "conv_bias": False, "norm_eps": 1e-2},
}


def values_of(config):
    """Initial values moved off zero and one, which would hide a parameter that is not used."""
    rng = np.random.default_rng(7)
    return {name: value + 0.05 * rng.normal(size=value.shape) for name, value in initial_values(config, 3)}


# --- mambapy.vim -----------------------------------------------------------------------------------


def their_blocks(config, values, pscan=True):
    vim = pytest.importorskip("mambapy.vim")
    theirs = vim.VMamba(
        vim.MambaConfig(
            d_model=config.d_model,
            n_layers=config.n_layer,
            dt_rank=config.dt_rank,
            d_state=config.d_state,
            expand_factor=config.expand,
            d_conv=config.d_conv,
            rms_norm_eps=config.norm_eps,
            bias=config.bias,
            conv_bias=config.conv_bias,
            pscan=pscan,
            divide_output=config.divide_output,
        )
    ).double()
    named = {name.removeprefix("backbone.").replace("A_b_log", "A_log_b"): value for name, value in values.items()}
    theirs.load_state_dict({name: torch.from_numpy(value) for name, value in named.items()}, strict=True)
    return theirs


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("pscan", [True, False])
def test_reference_equals_mambapy(variant, pscan):
    config = dataclasses.replace(BLOCKS, **VARIANTS[variant])
    values, x = values_of(config), np.random.default_rng(0).normal(size=(2, 19, config.d_model))
    expected = in_float64(their_blocks(config, values, pscan), torch.from_numpy(x)).detach().numpy()
    assert relative_l2(ReferenceModel(config, values)(x).hidden, expected) <= 1e-12


def test_gradients_equal_mambapy():
    values, x = values_of(BLOCKS), np.random.default_rng(0).normal(size=(2, 19, 12))
    weights, theirs = np.random.default_rng(1).normal(size=x.shape), their_blocks(BLOCKS, values)
    (in_float64(theirs, torch.from_numpy(x)) * torch.from_numpy(weights)).sum().backward()
    ours, _ = ReferenceModel(BLOCKS, values).vjp(weights, x)
    for name, parameter in theirs.named_parameters():
        own = "backbone." + name.replace("A_log_b", "A_b_log")
        assert relative_l2(ours[own], parameter.grad.numpy()) <= 1e-11, name


def test_backend_equals_mambapy(backend):
    values, x = values_of(BLOCKS), np.random.default_rng(0).normal(size=(2, 19, 12)).astype(np.float32)
    stored = {name: value.astype(np.float32) for name, value in values.items()}
    model = backend.build(BLOCKS, stored.items())
    found = backend.to_numpy(model(backend.from_numpy(x, device=model.device)).hidden)
    theirs = their_blocks(BLOCKS, {name: value.astype(np.float64) for name, value in stored.items()})
    expected = in_float64(theirs, torch.from_numpy(x).double()).detach().numpy()
    assert relative_l2(found, expected) <= tolerance("float32")


def test_the_step_of_mambapy_is_of_one_direction():
    """Where theirs is wrong: its step leaves the reverse direction out, so that it is not its forward."""
    config = dataclasses.replace(BLOCKS, n_layer=1)
    values, x = values_of(config), torch.from_numpy(np.random.default_rng(0).normal(size=(2, 7, 12)))
    theirs, cache, stepped = their_blocks(config, values), [(None, torch.zeros(2, 24, 3, dtype=torch.float64))], []
    with torch.no_grad():
        for position in x.unbind(1):
            y, cache = in_float64(theirs.step, position, cache)
            stepped.append(y)
        whole = in_float64(theirs, x)
    forward = {name: value for name, value in values.items() if "_b" not in name.replace("A_b_log", "_b")}
    plain = mc.MambaConfig(d_model=12, n_layer=1, d_state=3, task="layers")
    wanted = ReferenceModel(plain, forward)(x.numpy()).hidden
    stepped = torch.stack(stepped, dim=1).numpy()
    assert relative_l2(stepped, wanted) <= 1e-12
    assert relative_l2(stepped, whole.numpy()) > 1e-2


# --- the model as the original computes it, of torch's functions and mamba_ssm's recurrence ---------


def mixer_as_published(config, named, hidden):
    """Algorithm 1 of the paper: hidden (b, l, d); named without the mixer's prefix."""
    scan = imported("ops.selective_scan_interface").selective_scan_ref
    x, z = F.linear(hidden, named["in_proj.weight"], named.get("in_proj.bias")).mT.chunk(2, dim=1)

    def convolved(x, end):
        weight = named[f"conv1d{end}.weight"]
        y = F.conv1d(x, weight, named.get(f"conv1d{end}.bias"), padding=weight.shape[2] - 1, groups=len(weight))
        return F.silu(y[..., : x.shape[2]])

    def selected(x, end):
        sizes = (config.dt_rank_size, config.d_state, config.d_state)
        dt, B, C = F.linear(x.mT, named[f"x_proj{end}.weight"]).split(sizes, dim=2)
        return F.linear(dt, named[f"dt_proj{end}.weight"]).mT, B.mT, C.mT

    def scanned(x, z, selection, A_log, end):
        options = {"z": z, "delta_bias": named[f"dt_proj{end}.bias"], "delta_softplus": True}
        delta, B, C = selection
        return in_float64(scan, x, delta, -torch.exp(named[A_log]), B, C, named[f"D{end}"], **options)

    if config.bimamba_type == "v2":
        y = scanned(u := convolved(x, ""), z, selected(u, ""), "A_log", "")
        y_b = scanned(u := convolved(x.flip(2), "_b"), z.flip(2), selected(u, "_b"), "A_b_log", "_b")
    else:
        u = convolved(x, "")
        y = scanned(u, z, selected(u, ""), "A_log", "")
        flipped = [value.flip(2) for value in selected(u, "")]
        y_b = scanned(u.flip(2), z.flip(2), flipped, "A_b_log", "")
    y = y + y_b.flip(2)
    y = y / 2 if config.divide_output else y
    return F.linear(y.mT, named["out_proj.weight"], named.get("out_proj.bias"))


def as_published(config, values, images):
    """The logits, with the class token in the middle."""
    named = {name: torch.from_numpy(value) for name, value in values.items()}
    weight, bias = named["patch_embed.weight"], named["patch_embed.bias"]
    x = F.conv2d(torch.from_numpy(images), weight, bias, stride=2).flatten(2).mT
    middle = x.shape[1] // 2
    x = torch.cat([x[:, :middle], named["cls_token"].expand(len(x), -1, -1), x[:, middle:]], dim=1) + named["pos_embed"]
    norm = lambda x, name: F.rms_norm(x, x.shape[-1:], named[name], config.norm_eps)  # noqa: E731
    for layer in range(config.n_layer):
        prefix = f"backbone.layers.{layer}."
        inner = {name.removeprefix(prefix + "mixer."): value for name, value in named.items() if prefix in name}
        x = x + mixer_as_published(config, inner, norm(x, prefix + "norm.weight"))
    return F.linear(norm(x, "backbone.norm_f.weight")[:, middle], named["head.weight"], named["head.bias"])


@pytest.mark.parametrize("bimamba_type", ["v2", "v1"])
@pytest.mark.parametrize("divide_output", [True, False])
def test_reference_equals_the_model_as_published(bimamba_type, divide_output):
    pytest.importorskip("einops")
    config = dataclasses.replace(IMAGES, bimamba_type=bimamba_type, divide_output=divide_output)
    values, images = values_of(config), np.random.default_rng(0).normal(size=(2, 3, 8, 8))
    expected = as_published(config, values, images).numpy()
    assert relative_l2(ReferenceModel(config, values)(images).logits, expected) <= 1e-12


def test_backend_equals_the_model_as_published(backend):
    pytest.importorskip("einops")
    values = {name: value.astype(np.float32) for name, value in values_of(IMAGES).items()}
    images = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)
    model = backend.build(IMAGES, values.items())
    found = backend.to_numpy(model(backend.from_numpy(images, device=model.device)).logits)
    exact = {name: value.astype(np.float64) for name, value in values.items()}
    assert relative_l2(found, as_published(IMAGES, exact, images.astype(np.float64)).numpy()) <= tolerance("float32")


# --- positions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["middle", "first", "double", "none"])
@pytest.mark.parametrize("shown", [(27, 27), (3, 20)])
def test_positions_are_interpolated_as_torch_does(place, shown):
    """The class token's row is taken out where it is, and put in where it is in the larger sequence."""
    rng, patches, count = np.random.default_rng(0), 14 * 14, shown[0] * shown[1]
    grid = rng.normal(size=(14, 14, 6))
    tokens = {"double": rng.normal(size=(2, 6)), "none": np.zeros((0, 6))}.get(place, rng.normal(size=(1, 6)))
    larger = F.interpolate(torch.from_numpy(grid).permute(2, 0, 1)[None], size=shown, mode="bicubic")
    larger = larger[0].permute(1, 2, 0).reshape(count, 6).numpy()

    def among(rows):
        at = {"middle": [len(rows) // 2], "first": [0], "double": [0, len(rows)], "none": []}[place]
        return np.insert(rows, at, tokens, axis=0)

    matrix = positions(place, (14, 14), shown, False)
    assert matrix.shape == (count + len(tokens), patches + len(tokens))
    np.testing.assert_allclose(matrix @ among(grid.reshape(patches, 6)), among(larger), atol=1e-13)


def test_the_originals_order_mixes_the_class_token_with_patches():
    """In its code the positions behind the middle token are shifted by one, and the token takes the row of a patch."""
    rng = np.random.default_rng(0)
    table = rng.normal(size=(197, 6))
    extra, grid = table[:1], torch.from_numpy(table[1:]).reshape(1, 14, 14, 6).permute(0, 3, 1, 2)
    larger = F.interpolate(grid, size=(27, 27), mode="bicubic").permute(0, 2, 3, 1).flatten(1, 2)[0].numpy()
    theirs = positions("middle", (14, 14), (27, 27), True) @ table
    np.testing.assert_allclose(theirs, np.concatenate([extra, larger]), atol=1e-13)
    ours = positions("middle", (14, 14), (27, 27), False) @ table
    np.testing.assert_allclose(ours[729 // 2], table[98], atol=1e-13)
    assert relative_l2(theirs[729 // 2], table[98]) > 0.5
    same = positions("first", (14, 14), (27, 27), True)
    np.testing.assert_array_equal(same, positions("first", (14, 14), (27, 27), False))
