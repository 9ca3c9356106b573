"""JAX's loss of a large vocabulary, which is never whole in memory, against the plain one."""

import numpy as np
import pytest

import mamba_core as mc
from mamba_core.spec.tolerances import relative_l2, tolerance

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")

import jax.numpy as jnp  # noqa: E402 (after the package that it needs)
from flax import nnx  # noqa: E402

from mamba_core.backends.jax.ops import cross_entropy as jax_loss  # noqa: E402
from mamba_core.backends.jax.training import loss  # noqa: E402

ROWS, WIDTH, VOCABULARY = 150, 8, 20


@pytest.fixture(params=[ROWS, 64, 1])
def in_parts(request, monkeypatch):
    """With so many rows in memory at once, rounded up."""
    monkeypatch.setattr(jax_loss, "BYTES", 4 * VOCABULARY * request.param)


def arrays(dtype="float32"):
    rng = np.random.default_rng(0)
    hidden, weight = rng.normal(size=(ROWS, WIDTH)), 2 * rng.normal(size=(VOCABULARY, WIDTH))
    targets, counts = rng.integers(0, VOCABULARY, ROWS), rng.random(ROWS) < 0.7
    return jnp.asarray(hidden, dtype), jnp.asarray(weight, dtype), jnp.asarray(targets), jnp.asarray(counts)


def plain(hidden, weight, targets, counts):
    logits = jnp.matmul(hidden.astype(jnp.float32), weight.astype(jnp.float32).T, precision="highest")
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).sum(where=counts)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_the_plain_loss(in_parts, dtype):
    hidden, weight, targets, counts = arrays(dtype)

    def differentiated(function):
        tripled = jax.value_and_grad(lambda *given: 3 * function(*given, targets, counts), argnums=(0, 1))
        return jax.jit(tripled)(hidden, weight)

    (value, gradients), (expected, wanted) = differentiated(jax_loss.linear_cross_entropy), differentiated(plain)
    assert relative_l2(value, expected) < tolerance("float32")
    assert relative_l2(jax_loss.linear_cross_entropy(hidden, weight, targets, counts), expected / 3) < tolerance(
        "float32"
    )
    for gradient, right in zip(gradients, wanted, strict=True):
        assert gradient.dtype == jnp.dtype(dtype)
        assert relative_l2(gradient, right.astype(jnp.float32)) < tolerance(dtype, "gradient")


def test_its_second_derivative(in_parts):
    hidden, weight, targets, counts = arrays()

    def penalty(function):
        return jax.grad(lambda h: (jax.grad(lambda h: function(h, weight, targets, counts))(h) ** 2).sum())(hidden)

    value, right = penalty(jax_loss.linear_cross_entropy), penalty(plain)
    assert relative_l2(value, right) < tolerance("float32", "gradient")


@pytest.mark.parametrize("target", [-1, VOCABULARY])
def test_a_target_outside_the_vocabulary_spoils_the_loss_where_it_counts(in_parts, target):
    hidden, weight, targets, counts = arrays()
    targets = targets.at[3].set(target)
    assert jnp.isnan(jax_loss.linear_cross_entropy(hidden, weight, targets, counts.at[3].set(True)))
    assert jnp.isfinite(jax_loss.linear_cross_entropy(hidden, weight, targets, counts.at[3].set(False)))


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_has_it_and_one_with_another_head_the_plain_one(monkeypatch, tied):
    config = mc.MambaConfig(d_model=16, n_layer=1, vocab_size=VOCABULARY, tie_embeddings=tied)
    model = mc.build(config, backend="jax")
    rng = np.random.default_rng(0)
    tokens, mask = jnp.asarray(rng.integers(0, VOCABULARY, (2, 12))), jnp.asarray(rng.random((2, 12)) < 0.8)
    value, gradients = nnx.value_and_grad(loss)(model, tokens, mask)
    monkeypatch.setattr(type(model), "head_weight", lambda self: None)
    right, wanted = nnx.value_and_grad(loss)(model, tokens, mask)
    assert relative_l2(value, right) < tolerance("float32")
    for gradient, expected in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True):
        assert relative_l2(gradient, expected) < tolerance("float32", "gradient")
