"""What models of images have before their blocks and behind them."""

import mlx.core as mx
import mlx.nn as nn

from mamba_core.backends.mlx.untouched import untouched
from mamba_core.observe import Report
from mamba_core.spec.images import NAMES, class_rows, grid, positions
from mamba_core.tasks.image_features import PATCH, POSITIONS


class PatchEmbedding(nn.Module):
    """A product of each patch with weight (d, c, i, j), and a bias: (b, c, height, width) to (b, l, d)."""

    def __init__(self, channels: int, size: int, patch: tuple[int, int], stride: tuple[int, int]):
        super().__init__()
        self.stride = stride
        self.weight = mx.zeros((size, channels, *patch))
        self.bias = mx.zeros((size,))

    def __call__(self, images: mx.array) -> mx.array:
        weight = self.weight
        patches = _patches(images.astype(weight.dtype), weight.shape[2:], self.stride)
        return patches @ weight.reshape(len(weight), -1).T + self.bias


def add_parameters(model: nn.Module) -> None:
    """Gives a model of images what stands before its blocks."""
    task, size = model.task, model.config.d_model
    model.patch_embed = PatchEmbedding(task.channels, size, task.patch, task.steps)
    rows, columns = task.grid
    for name in NAMES[task.class_token]:
        setattr(model, name, mx.zeros((1, 1, size)))
    model.pos_embed = mx.zeros((1, rows * columns + len(NAMES[task.class_token]), size))


def embed(model: nn.Module, images: mx.array, observe: Report) -> mx.array:
    """(b, c, height, width) to the sequence that the blocks begin with, (b, l, d) float32."""
    task = model.task
    tokens = observe(PATCH, model.patch_embed(images)).astype(mx.float32)
    shown = grid(images.shape[2:], task.patch, task.steps)
    learnt = [getattr(model, name).astype(mx.float32) for name in (*NAMES[task.class_token], POSITIONS)]
    tokens = _with_classes(tokens, learnt[:-1], task.class_token)
    return observe("embedding", tokens + _positions(task, learnt[-1], shown))


def read(model: nn.Module, hidden: mx.array) -> mx.array:
    """What a classifier reads of (b, l, d): (b, d), the mean of the class tokens, or where there are none of all."""
    place = model.task.class_token
    rows = class_rows(place, hidden.shape[1] - len(NAMES[place]))
    read = (hidden if not rows else mx.stack([hidden[:, row] for row in rows], axis=1)).astype(mx.float32)
    return read.mean(axis=1)


def classify(head: nn.Module, read: mx.array) -> mx.array:
    """Logits in float32."""
    if not untouched(nn.Linear, head):
        return head(read).astype(mx.float32)
    logits = read @ head.weight.astype(mx.float32).T
    return logits + head.bias.astype(mx.float32) if "bias" in head else logits


def _patches(images: mx.array, patch: tuple[int, int], stride: tuple[int, int]) -> mx.array:
    """(b, c, height, width) to (b, l, c * i * j), row by row."""
    batch, channels, *size = images.shape
    rows, columns = grid(size, patch, stride)
    (i, j), (down, right) = patch, stride
    if patch == stride:
        images = images[:, :, : rows * i, : columns * j].reshape(batch, channels, rows, i, columns, j)
    else:
        images = images[:, :, mx.arange(rows)[:, None] * down + mx.arange(i)]
        images = images[..., mx.arange(columns)[:, None] * right + mx.arange(j)]
    return images.transpose(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, -1)


def _with_classes(tokens: mx.array, learnt: list[mx.array], place: str) -> mx.array:
    """The patches with the class tokens among them."""
    parts, done = [], 0
    for index, (value, row) in enumerate(zip(learnt, class_rows(place, tokens.shape[1]), strict=True)):
        parts += [tokens[:, done : row - index], mx.broadcast_to(value, (len(tokens), *value.shape[1:]))]
        done = row - index
    return mx.concatenate([*parts, tokens[:, done:]], axis=1)


def _positions(task, table: mx.array, shown: tuple[int, int]) -> mx.array:
    """The table of positions, for an image of that grid."""
    matrix = positions(task.class_token, task.grid, shown, task.class_first)
    return table if matrix is None else mx.array(matrix).astype(table.dtype) @ table
