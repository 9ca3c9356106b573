"""The kernels in Triton compiled for an H100 where there is no GPU: that they compile, and what they take of it.

Triton must not have been told to interpret them, so that the tests run in a process of their own.
"""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from mamba_core.backends.torch.kernels import (
    triton,
    triton_attention_step,
    triton_block,
    triton_choice,
    triton_conv,
    triton_experts_step,
    triton_feed_forward_step,
    triton_gated_norm,
    triton_linear,
    triton_loss,
    triton_norm,
    triton_product,
    triton_ssd_step,
    triton_step,
)
from mamba_core.backends.torch.kernels.triton_linear import Packed
from mamba_core.spec.ops.attention import Rotary
from tests.unit.triton_compile import compiled, resources

COMPILES = triton.MISSING is None and not triton.INTERPRETED
here = pytest.mark.skipif(not COMPILES, reason="needs Triton, in a process of its own")
D, E, N, R, V = 768, 1536, 16, 48, 50280
# The most rows of each set of kernels.
FEW, SOME = triton_linear.MOST_ROWS, triton_product.MOST_ROWS


@pytest.mark.skipif(COMPILES or triton.INTERPRETED, reason="runs already")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_all_of_them_in_another_process():
    # Without the project's -q, the last line says how many have passed.
    command = [sys.executable, "-m", "pytest", "-x", "-o", "addopts=--import-mode=importlib", __file__]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "0"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout.splitlines()[-1]


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype)


def floats(*shape):
    return empty(*shape, dtype=torch.float32)


def check(found, kernels, registers, stack=0):
    assert [name for name, _ in found] == kernels
    for name, built in found:
        used = resources(built)
        assert used["REG"] <= registers, (name, used)
        # A register that is kept in memory would cost more than it saves.
        assert used["STACK"] <= stack, (name, used)


@here
def test_add_norm():
    norm = (floats(8, D), empty(8, D), floats(D), 1e-5, torch.bfloat16)
    with compiled(triton_norm) as found:
        triton_norm._forward(*norm)
        triton_norm._backward(empty(8, D), floats(8, D), floats(8, D), floats(8), *norm)
    check(found, ["_add_norm_kernel", "_add_norm_backward_kernel"], 64)


@here
@pytest.mark.parametrize(("rank", "states"), [(R, N), (256, N), (5, 3), (1, 256)])
def test_norms_of_dt_b_and_c(rank, states):
    dtbc = empty(3, 64, rank + 2 * states)
    with compiled(triton_norm) as found:
        triton_norm.unit_norms(dtbc, states, 1e-6)
        triton_norm.unit_norms_backward_(dtbc, dtbc, states, 1e-6)
    check(found, ["_unit_norms_kernel", "_unit_norms_backward_kernel"], 64)


@here
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize(
    ("e", "groups", "registers"), [(1536, 1, 64), (8192, 8, 96), (triton_gated_norm.WIDEST, 1, 128)]
)
def test_gated_norm(e, groups, before, dtype, registers):
    """Every row is read in words of 16 bytes, where z is a slice of in_proj's output too."""
    y, z, weight = empty(1, 64, e, dtype=dtype), empty(1, 64, 2 * e + 280, dtype=dtype)[..., :e], empty(e, dtype=dtype)
    with compiled(triton_gated_norm) as found:
        normed, factors = triton_gated_norm._forward(y, z, weight, groups, 1e-5, before, dtype)
        triton_gated_norm._backward(normed, factors, y, z, weight, groups, 1e-5, before, dtype)
    check(found, ["_gated_norm_kernel", "_gated_norm_backward_kernel"], registers)
    for (_, built), factors in zip(found, (0, 1), strict=True):
        text = built.asm["ptx"]
        assert text.count("ld.global") - text.count("ld.global.v4") == factors


@here
@pytest.mark.parametrize("runs", [False, True])
def test_conv(runs):
    x, taps, bias, state = empty(1, 64, 2 * E)[..., :E], floats(E, 4), floats(E), floats(1, 3, E)
    own = torch.empty(1, 64, dtype=torch.int32) if runs else None
    conv = (x, taps, bias, state, own, True)
    with compiled(triton_conv) as found:
        triton_conv.conv(*conv)
        triton_conv.conv_backward(empty(1, 64, E), None, *conv, empty(1, 64, 2 * E)[..., :E], empty(1, 64, E))
    check(found, ["_conv_kernel", "_conv_backward_kernel"], 255)


@here
def test_cross_entropy():
    with compiled(triton_loss) as found:
        triton_loss._cross_entropy(empty(4, V), torch.empty(4, dtype=torch.int64), floats(4), True)
    check(found, ["_cross_entropy_kernel"], 80)


@here
def test_the_likeliest_token():
    with compiled(triton_choice) as found:
        triton_choice.likeliest(floats(2, V))
    check(found, ["_parts_kernel", "_likeliest_kernel"], 80)


def weight(outputs, inputs, bits=0):
    if not bits:
        return empty(outputs, inputs)
    words = torch.empty(outputs, inputs * bits // 32, dtype=torch.int32)
    return Packed(words, empty(outputs, inputs // 32), bits, 32)


def check_asking(found, asking):
    """What is large is asked for before the kernel waits for the one before it."""
    for name, built in found:
        if name in asking:
            before, waited, _ = built.asm["ptx"].partition("griddepcontrol.wait")
            assert waited
            assert asking[name] in before


ASKING = {"_linear_kernel": "ld.global.v4.b32", "_product_kernel": "prefetch.global.L2"}


@here
@pytest.mark.parametrize("bits", [0, 8, 4])
@pytest.mark.parametrize("rows", [1, FEW, 64, SOME, SOME + 1])
@pytest.mark.parametrize("selection_eps", [0.0, 1e-6])
def test_a_position(bits, rows, selection_eps):
    small = (empty(E, 4), empty(E), empty(R + 2 * N, E), empty(E, R), floats(E), floats(E, N), floats(E))
    matrices = weight(2 * E, D, bits), weight(D, E, bits)
    layer = triton_step.Layer(empty(D), 1e-5, matrices[0], None, *small, matrices[1], None, selection_eps)
    conv, ssm = empty(rows, 3, E), floats(rows, E, N)
    counters = triton_product.new_counters(conv.device)
    with compiled(triton_block, triton_linear, triton_norm, triton_product, triton_step) as found:
        triton_step.block(layer, floats(rows, D), None, conv, ssm, (conv, ssm), counters)
        triton_step.embed(torch.empty(rows, dtype=torch.int64), empty(V, D), torch.float32)
    few = ["_linear_kernel", "_linear_kernel", "_recurrence_kernel", "_linear_kernel"]
    many = ["_add_norm_kernel", "_conv_step_kernel", "_recurrences_kernel"]
    some = ["_add_norm_kernel", "_product_kernel", "_product_kernel", "_recurrences_kernel", "_product_kernel"]
    kernels = few if rows <= FEW else some if rows <= SOME and not bits else many
    check(found, [*kernels, "_embed_kernel"], 255)
    check_asking(found, ASKING)


@here
@pytest.mark.parametrize(("rows", "bits"), [(1, 0), (1, 4), (FEW, 0), (64, 0), (SOME + 1, 0)])
@pytest.mark.parametrize(("d", "groups", "before"), [(768, 1, False), (4096, 8, True)])
def test_a_position_of_the_ssd(d, groups, before, bits, rows):
    """The state is read and written in words of 16 bytes, once; with limits of the steps, and with a D a channel."""
    e, p, n = 2 * d, 64, 128
    heads, filters = e // p, e + 2 * groups * n
    matrices = weight(e + filters + heads, d, bits), weight(d, e, bits)
    small = empty(filters, 4), empty(filters), floats(heads), floats(heads), floats(e if before else heads), empty(e)
    settings = (p, groups, (0.01, 0.5) if before else (0.0, float("inf")), 1e-5, before)
    layer = triton_ssd_step.Layer(empty(d), 1e-5, matrices[0], None, *small, matrices[1], None, *settings)
    conv, ssm = empty(rows, 3, filters), torch.empty(1, dtype=torch.float32).expand(rows, heads, p, n)
    counters = triton_product.new_counters(conv.device)
    modules = (triton_block, triton_gated_norm, triton_linear, triton_norm, triton_product, triton_ssd_step)
    with compiled(*modules) as found:
        triton_ssd_step.block(layer, floats(rows, d), None, conv, ssm, (conv, ssm), counters)
    norm = [] if rows <= FEW and groups == 1 else ["_gated_norm_kernel"]
    few = ["_linear_kernel", "_ssd_step_kernel", *norm, "_linear_kernel"]
    some = ["_add_norm_kernel", "_product_kernel", "_ssd_step_kernel", *norm, "_product_kernel"]
    many = ["_add_norm_kernel", "_conv_step_kernel", "_ssd_step_kernel", *norm]
    check(found, few if rows <= FEW else some if rows <= SOME and not bits else many, 255)
    check_asking(found, ASKING | {"_ssd_step_kernel": "prefetch.global.L2"})
    (built,) = (built for name, built in found if name == "_ssd_step_kernel")
    assert resources(built)["REG"] <= 96
    text = built.asm["ptx"]
    # 32 floats of the state a thread.
    words = [line for line in text.splitlines() if "st.global" in line and ".b32" in line and "{" in line]
    assert len([line for line in words if ".v4" in line]) == 8


@here
@pytest.mark.parametrize("outputs", [10240, 2560, 192])
def test_a_product(outputs):
    """On the matrix units, and what they need next is on its way to them."""
    x, weight, y = empty(64, 2560), empty(outputs, 2560), empty(64, outputs)
    with compiled(triton_product) as found:
        triton_product.multiply(x, weight, None, y, triton_product.new_counters(x.device))
    check(found, ["_product_kernel"], 128)
    assert "wgmma" in found[0][1].asm["ptx"]
    assert "cp.async" in found[0][1].asm["ptx"]


JAMBA_D, JAMBA_I = 2560, 8192


@here
@pytest.mark.parametrize("rotary", [Rotary(), Rotary(64), Rotary(64, interleaved=True)])
@pytest.mark.parametrize("rows", [1, FEW])
def test_a_position_of_attention(rows, rotary):
    """Of jamba-reasoning-3b, and with positions."""
    heads, size = 20, 128
    products = empty((heads + 2) * size, JAMBA_D), None, empty(JAMBA_D, heads * size), None
    layer = triton_attention_step.Layer(empty(JAMBA_D), 1e-6, *products, heads, 1, size, 0.1, rotary)
    cache = empty(rows, 4096, 1, size), empty(rows, 4096, 1, size), torch.empty(rows, dtype=torch.int32)
    with compiled(triton_block, triton_linear, triton_attention_step) as found:
        layer.step(floats(rows, JAMBA_D), None, *cache, cache, None)
    # A cosine of any angle keeps some words in memory.
    kernels = ["_linear_kernel", "_attend_kernel", "_join_kernel", "_linear_kernel"]
    check(found, kernels, 255, stack=32 if rotary.size else 0)


@here
@pytest.mark.parametrize("bits", [0, 8, 4])
@pytest.mark.parametrize("rows", [1, FEW])
def test_a_position_of_a_swiglu(rows, bits):
    products = weight(2 * JAMBA_I, JAMBA_D, bits), weight(JAMBA_D, JAMBA_I, bits)
    layer = triton_feed_forward_step.FeedForward(empty(JAMBA_D), 1e-6, *products)
    with compiled(triton_block, triton_linear) as found:
        layer.step(floats(rows, JAMBA_D), None, None)
    check(found, ["_linear_kernel", "_linear_kernel"], 255)
    check_asking(found, ASKING)


@here
def test_a_position_of_experts():
    shapes = (16, JAMBA_D), (16, 2 * JAMBA_I, JAMBA_D), (16, JAMBA_D, JAMBA_I)
    layer = triton_experts_step.Experts(empty(JAMBA_D), 1e-6, *(empty(1).expand(shape) for shape in shapes), 2)
    with compiled(triton_block, triton_linear, triton_experts_step) as found:
        layer.step(floats(1, JAMBA_D), None, None)
    check(found, ["_linear_kernel", "_choice_kernel", "_gate_up_kernel", "_down_kernel"], 128)
