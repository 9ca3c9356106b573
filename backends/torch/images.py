"""What models of images have before their blocks and behind them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba_core.backends.torch.arrays import at_least_float32
from mamba_core.backends.torch.untouched import untouched
from mamba_core.observe import Report
from mamba_core.spec.images import NAMES, class_rows, grid, positions
from mamba_core.tasks.image_features import PATCH, POSITIONS


class PatchEmbedding(nn.Module):
    """A product of each patch with weight (d, c, i, j), and a bias: (b, c, height, width) to (b, l, d)."""

    def __init__(self, channels: int, size: int, patch: tuple[int, int], stride: tuple[int, int]):
        super().__init__()
        self.stride = stride
        self.weight = nn.Parameter(torch.empty(size, channels, *patch))
        self.bias = nn.Parameter(torch.empty(size))

    def forward(self, images: Tensor) -> Tensor:
        (rows, columns), (down, across) = self.weight.shape[2:], self.stride
        # (b, c, patches down, patches across, rows, columns), a view; torch's own unfold goes image by image on a GPU.
        patches = images.to(self.weight.dtype).unfold(2, rows, down).unfold(3, columns, across)
        patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        return F.linear(patches, self.weight.flatten(1), self.bias)


def add_parameters(model: nn.Module) -> None:
    """Gives a model of images what stands before its blocks."""
    task, size = model.task, model.config.d_model
    model.patch_embed = PatchEmbedding(task.channels, size, task.patch, task.steps)
    rows, columns = task.grid
    for name in NAMES[task.class_token]:
        setattr(model, name, nn.Parameter(torch.empty(1, 1, size)))
    model.pos_embed = nn.Parameter(torch.empty(1, rows * columns + len(NAMES[task.class_token]), size))


def embed(model: nn.Module, images: Tensor, observe: Report) -> Tensor:
    """(b, c, height, width) to the sequence that the blocks begin with, (b, l, d), at least in float32."""
    task = model.task
    tokens = at_least_float32(observe(PATCH, model.patch_embed(images)))
    shown = grid(images.shape[2:], task.patch, task.steps)
    learnt = [at_least_float32(getattr(model, name)) for name in (*NAMES[task.class_token], POSITIONS)]
    tokens = _with_classes(tokens, learnt[:-1], task.class_token)
    return observe("embedding", tokens + _positions(task, learnt[-1], shown))


def read(model: nn.Module, hidden: Tensor) -> Tensor:
    """What a classifier reads of (b, l, d): (b, d), the mean of the class tokens, or where there are none of all."""
    place = model.task.class_token
    rows = class_rows(place, hidden.shape[1] - len(NAMES[place]))
    read = at_least_float32(hidden if not rows else torch.stack([hidden[:, row] for row in rows], dim=1))
    return read.mean(1)


def classify(head: nn.Module, read: Tensor) -> Tensor:
    """Logits at least in float32."""
    if not untouched(nn.Linear, head):
        return at_least_float32(head(read.to(head.weight.dtype) if isinstance(head, nn.Linear) else read))
    return F.linear(read, *(None if value is None else value.to(read.dtype) for value in (head.weight, head.bias)))


def _with_classes(tokens: Tensor, learnt: list[Tensor], place: str) -> Tensor:
    """The patches with the class tokens among them."""
    parts, done = [], 0
    for index, (value, row) in enumerate(zip(learnt, class_rows(place, tokens.shape[1]), strict=True)):
        parts += [tokens[:, done : row - index], value.expand(len(tokens), -1, -1)]
        done = row - index
    return torch.cat([*parts, tokens[:, done:]], dim=1)


def _positions(task, table: Tensor, shown: tuple[int, int]) -> Tensor:
    """The table of positions, for an image of that grid."""
    matrix = positions(task.class_token, task.grid, shown, task.class_first)
    return table if matrix is None else torch.tensor(matrix, dtype=table.dtype, device=table.device) @ table
