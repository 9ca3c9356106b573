"""MLX's transformations on the model as it comes."""

from functools import partial

import numpy as np
import pytest

import mamba_core as mc
from mamba_core import registry
from mamba_core.backends.native import library
from mamba_core.spec.tolerances import relative_l2
from tests.unit.transforms import IDS, MASK, SEGMENTS, plain, scan_arguments

mx = pytest.importorskip("mlx.core")
nn = pytest.importorskip("mlx.nn")
optim = pytest.importorskip("mlx.optimizers")
utils = pytest.importorskip("mlx.utils")


def cross_entropy(model, ids):
    return nn.losses.cross_entropy(model(ids[:, :-1]).logits, ids[:, 1:], reduction="mean")


def test_compile_forward_sees_new_parameters():
    model, ids, logits = plain("mlx")
    compiled = mx.compile(lambda ids: model(ids).logits, inputs=model.state)
    assert relative_l2(np.array(compiled(ids)), logits) < 1e-6
    model.update(utils.tree_map(lambda value: value * 1.1, model.parameters()))
    assert relative_l2(np.array(compiled(ids)), np.array(model(ids).logits)) < 1e-6
    assert relative_l2(np.array(compiled(ids)), logits) > 1e-2


def test_compile_forward_with_a_state():
    model, ids, _ = plain("mlx")
    state = model(ids[:, :7]).state
    compiled = mx.compile(lambda ids, state: model(ids, state), inputs=model.state)
    for one, other in zip(_leaves(compiled(ids, state)), _leaves(model(ids, state)), strict=True):
        assert relative_l2(np.array(one), np.array(other)) < 1e-6


def test_compile_training_step_is_the_plain_one():
    def losses(compiled):
        model, ids, _ = plain("mlx")
        optimizer = optim.Adam(1e-2)
        optimizer.init(model.trainable_parameters())

        def step(ids):
            value, gradients = nn.value_and_grad(model, cross_entropy)(model, ids)
            optimizer.update(model, gradients)
            return value

        state = [model.state, optimizer.state]
        run = partial(mx.compile, inputs=state, outputs=state)(step) if compiled else step
        return [run(ids).item() for _ in range(8)]

    plainly = losses(compiled=False)
    assert plainly[-1] < plainly[0] - 0.3
    # Each of Adam's steps divides by the root of the second moment, and rounding grows with the steps.
    assert relative_l2(losses(compiled=True), plainly) < 1e-4


def test_remat_keeps_less_for_the_gradient():
    if reason := library.missing():
        pytest.skip(f"the native kernels: {reason}")
    ids = np.zeros((1, 1025), np.int32)
    backend = registry.get("mlx")

    def peak(layers, remat):
        """Bytes beside the model's."""
        model = mc.build(mc.MambaConfig(d_model=64, n_layer=layers, vocab_size=64), backend="mlx", device="cpu")
        model.remat = remat
        mx.eval(model.parameters())
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        backend.loss_and_gradients(model, ids)
        return mx.get_peak_memory() - before

    # A block more keeps what enters it and the gradient of that, each of the size of the residual stream.
    assert peak(6, True) - peak(2, True) < (peak(6, False) - peak(2, False)) / 6


def test_checkpoint_keeps_the_gradient():
    model, ids, _ = plain("mlx")

    def loss(parameters):
        model.update(parameters)
        return cross_entropy(model, ids)

    parameters = model.trainable_parameters()
    for one, other in zip(
        _leaves(mx.grad(mx.checkpoint(loss))(parameters)), _leaves(mx.grad(loss)(parameters)), strict=True
    ):
        assert relative_l2(np.array(one), np.array(other)) < 1e-5


def vmapped_rows(model, ids):
    """Rows, masked and packed, as vmap sees them."""

    def row(ids, mask, segments):
        return model(ids[None], mask=mask[None], segment_ids=segments[None]).logits[0]

    return mx.vmap(row)(ids, mx.array(MASK), mx.array(SEGMENTS))


def vmapped_states(model, ids, states):
    stacked = utils.tree_map(lambda *values: mx.stack(values), *states)
    return mx.vmap(lambda state: model(ids, state).logits)(stacked)


def vmapped_gradients(model, ids):
    """The gradient of A_log of each sample."""
    mixer = model.backbone.layers[0].mixer
    kept = mixer.A_log

    def loss(A_log, ids):
        mixer.A_log = A_log
        return model(ids).logits.square().sum()

    gradient = mx.grad(loss)
    samples = mx.vmap(gradient, in_axes=(None, 0))(kept, ids[:, None])
    alone = mx.stack([gradient(kept, ids[index : index + 1]) for index in range(len(ids))])
    mixer.A_log = kept
    return samples, alone


def test_vmap_of_a_sequential_model():
    model, ids, _ = plain("mlx", kernels="sequential")
    wanted = model(ids, mask=mx.array(MASK), segment_ids=mx.array(SEGMENTS)).logits
    assert relative_l2(np.array(vmapped_rows(model, ids)), np.array(wanted)) < 1e-6
    states = [model(ids[:, :length]).state for length in (3, 20)]
    wanted = mx.stack([model(ids, state).logits for state in states])
    assert relative_l2(np.array(vmapped_states(model, ids, states)), np.array(wanted)) < 1e-6
    samples, alone = vmapped_gradients(model, ids)
    assert relative_l2(np.array(samples), np.array(alone)) < 1e-5


@pytest.mark.parametrize("kernels", ["auto", "chunked"])
@pytest.mark.parametrize("transform", [vmapped_rows, vmapped_gradients])
def test_vmap_of_another_model_names_the_kernel_that_can(transform, kernels):
    model, ids, _ = plain("mlx", kernels=kernels)
    with pytest.raises(NotImplementedError, match="kernels='plain'"):
        mx.eval(transform(model, ids))


@pytest.mark.parametrize("kernel", ["native", "chunked"])
@pytest.mark.parametrize("transform", ["vmap", "jvp", "second derivative"])
def test_transformations_that_a_fast_kernel_refuses(transform, kernel):
    arrays = [mx.array(value.astype(np.float32)) for value in scan_arguments().values()]

    def run(x, kernel):
        _, delta, A, B, C = arrays
        return mc.selective_scan(x, delta, -mx.exp(A), B, C, delta_softplus=True, kernel=kernel).square().sum()

    def transformed(kernel):
        function = {
            "vmap": lambda: mx.vmap(lambda x: run(x, kernel))(arrays[0][None]),
            "jvp": lambda: mx.jvp(lambda x: run(x, kernel), [arrays[0]], [arrays[0]]),
            "second derivative": lambda: mx.grad(lambda x: mx.grad(lambda x: run(x, kernel))(x).sum())(arrays[0]),
        }[transform]
        mx.eval(function())

    transformed("plain")
    with pytest.raises((NotImplementedError, ValueError), match=r"sequential|kernel='plain'"):
        transformed(kernel)


def test_quantised_model_still_generates():
    plain("mlx")
    config = mc.MambaConfig(d_model=64, n_layer=2, vocab_size=256, initializer_range=0.3)
    model = mc.build(config, backend="mlx")
    wanted = np.array(model(mx.array(IDS)).logits)
    nn.quantize(model, group_size=32, bits=8)
    assert isinstance(model.backbone.layers[0].mixer.in_proj, nn.QuantizedLinear)
    assert relative_l2(np.array(model(mx.array(IDS)).logits), wanted) < 0.05
    assert len(mc.generate(model, "def ", max_new_tokens=5).tokens[0]) == 5


def _leaves(tree):
    return [value for _, value in utils.tree_flatten(tree)]
