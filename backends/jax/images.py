"""What models of images have before their blocks and behind them."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from mamba_core.backends.jax.mixers import Options
from mamba_core.backends.jax.ops.linear import precision
from mamba_core.backends.jax.untouched import untouched
from mamba_core.observe import Report
from mamba_core.spec.images import NAMES, class_rows, grid, positions
from mamba_core.tasks.image_features import PATCH, POSITIONS


class PatchEmbedding(nnx.Module):
    """A product of each patch with weight (d, c, i, j), and a bias: (b, c, height, width) to (b, l, d)."""

    weight_leaf = "weight"

    def __init__(self, channels: int, size: int, patch: tuple[int, int], stride: tuple[int, int], dtype: str):
        self.stride = stride
        self.precision = precision(dtype)
        self.weight = nnx.Param(jnp.zeros((size, channels, *patch), dtype))
        self.bias = nnx.Param(jnp.zeros(size, dtype))

    def __call__(self, images: jax.Array) -> jax.Array:
        weight = self.weight[...]
        patches = _patches(images.astype(weight.dtype), weight.shape[2:], self.stride)
        return jnp.matmul(patches, weight.reshape(len(weight), -1).T, precision=self.precision) + self.bias[...]


def add_parameters(model: nnx.Module, options: Options) -> None:
    """Gives a model of images what stands before its blocks."""
    task, size, dtype = model.task, model.config.d_model, options.dtype
    model.patch_embed = PatchEmbedding(task.channels, size, task.patch, task.steps, dtype)
    rows, columns = task.grid
    for name in NAMES[task.class_token]:
        setattr(model, name, nnx.Param(jnp.zeros((1, 1, size), dtype)))
    model.pos_embed = nnx.Param(jnp.zeros((1, rows * columns + len(NAMES[task.class_token]), size), dtype))


def embed(model: nnx.Module, images: jax.Array, observe: Report) -> jax.Array:
    """(b, c, height, width) to the sequence that the blocks begin with, (b, l, d) float32."""
    task = model.task
    tokens = observe(PATCH, model.patch_embed(images)).astype(jnp.float32)
    shown = grid(images.shape[2:], task.patch, task.steps)
    learnt = [getattr(model, name)[...].astype(jnp.float32) for name in (*NAMES[task.class_token], POSITIONS)]
    tokens = _with_classes(tokens, learnt[:-1], task.class_token)
    return observe("embedding", tokens + _positions(task, learnt[-1], shown))


def read(model: nnx.Module, hidden: jax.Array) -> jax.Array:
    """What a classifier reads of (b, l, d): (b, d), the mean of the class tokens, or where there are none of all."""
    place = model.task.class_token
    rows = class_rows(place, hidden.shape[1] - len(NAMES[place]))
    read = (hidden if not rows else jnp.stack([hidden[:, row] for row in rows], axis=1)).astype(jnp.float32)
    return read.mean(axis=1)


def classify(head: nnx.Module, read: jax.Array) -> jax.Array:
    """Logits in float32."""
    if not untouched(nnx.Linear, head):
        return head(read).astype(jnp.float32)
    logits = jnp.matmul(read, head.kernel[...].astype(jnp.float32), precision=lax.Precision.HIGHEST)
    return logits if head.bias is None else logits + head.bias[...].astype(jnp.float32)


def _patches(images: jax.Array, patch: tuple[int, int], stride: tuple[int, int]) -> jax.Array:
    """(b, c, height, width) to (b, l, c * i * j), row by row."""
    batch, channels, *size = images.shape
    rows, columns = grid(size, patch, stride)
    (i, j), (down, right) = patch, stride
    if patch == stride:
        images = images[:, :, : rows * i, : columns * j].reshape(batch, channels, rows, i, columns, j)
    else:
        images = images[:, :, np.arange(rows)[:, None] * down + np.arange(i)]
        images = images[..., np.arange(columns)[:, None] * right + np.arange(j)]
    return images.transpose(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, -1)


def _with_classes(tokens: jax.Array, learnt: list[jax.Array], place: str) -> jax.Array:
    """The patches with the class tokens among them."""
    parts, done = [], 0
    for index, (value, row) in enumerate(zip(learnt, class_rows(place, tokens.shape[1]), strict=True)):
        parts += [tokens[:, done : row - index], jnp.broadcast_to(value, (len(tokens), *value.shape[1:]))]
        done = row - index
    return jnp.concatenate([*parts, tokens[:, done:]], axis=1)


def _positions(task, table: jax.Array, shown: tuple[int, int]) -> jax.Array:
    """The table of positions, for an image of that grid."""
    matrix = positions(task.class_token, task.grid, shown, task.class_first)
    if matrix is None:
        return table
    return jnp.matmul(jnp.asarray(matrix, table.dtype), table, precision=lax.Precision.HIGHEST)
