"""An image as a sequence, and the vector that a classifier reads."""

import numpy as np

from mamba_core.spec.images import NAMES, class_rows, grid, patch_rows, positions
from mamba_core.spec.ops.base import stateless


def patches(image: np.ndarray, patch: tuple[int, int], stride: tuple[int, int]) -> np.ndarray:
    """(b, c, height, width) -> (b, l, c, rows of a patch, columns of a patch), row by row."""
    windows = np.lib.stride_tricks.sliding_window_view(image, patch, axis=(2, 3))
    windows = windows[:, :, :: stride[0], :: stride[1]]
    batch, channels, rows, columns = windows.shape[:4]
    return windows.transpose(0, 2, 3, 1, 4, 5).reshape(batch, rows * columns, channels, *patch)


def _patch_embedding(inputs, parameters, settings):
    """A product of each patch with weight (d, c, i, j), plus the bias."""
    weight = parameters["weight"]
    return (
        np.einsum("blcij,dcij->bld", patches(inputs[0], weight.shape[2:], settings["stride"]), weight)
        + parameters["bias"]
    )


def _patch_embedding_vjp(dy, inputs, parameters, settings):
    image, weight, stride = inputs[0], parameters["weight"], settings["stride"]
    patch = weight.shape[2:]
    gradients = {"weight": np.einsum("bld,blcij->dcij", dy, patches(image, patch, stride)), "bias": dy.sum((0, 1))}
    rows, columns = grid(image.shape[2:], patch, stride)
    given = np.einsum("bld,dcij->blcij", dy, weight).reshape(len(image), rows, columns, *weight.shape[1:])
    dimage = np.zeros_like(image)
    for row in range(rows):
        for column in range(columns):
            top, left = row * stride[0], column * stride[1]
            dimage[:, :, top : top + patch[0], left : left + patch[1]] += given[:, row, column]
    return [dimage], gradients


def _image_tokens(inputs, parameters, settings):
    """The patches with the class tokens among them, plus the positions. inputs: patches (b, l, d), and the image."""
    embedded, place = inputs[0], settings["place"]
    batch, count, size = embedded.shape
    names = NAMES[place]
    value = np.empty((batch, count + len(names), size))
    value[:, patch_rows(place, count)] = embedded
    for name, row in zip(names, class_rows(place, count), strict=True):
        value[:, row] = parameters[name][0]
    matrix = _matrix(inputs[1], settings)
    table = parameters["positions"][0]
    return value + (table if matrix is None else matrix @ table)


def _image_tokens_vjp(dy, inputs, parameters, settings):
    place, count = settings["place"], inputs[0].shape[1]
    gradients = {
        name: dy[:, row].sum(0)[None, None] for name, row in zip(NAMES[place], class_rows(place, count), strict=True)
    }
    matrix, summed = _matrix(inputs[1], settings), dy.sum(0)
    gradients["positions"] = (summed if matrix is None else matrix.T @ summed)[None]
    return [dy[:, patch_rows(place, count)], None], gradients


def _matrix(image, settings) -> np.ndarray | None:
    shown = grid(image.shape[2:], settings["patch"], settings["stride"])
    return positions(settings["place"], settings["grid"], shown, settings["class_first"])


def _classified(inputs, parameters, settings):
    """(b, d), the mean over the class tokens, or over all positions where there are none."""
    return inputs[0][:, _read(inputs[0], settings)].mean(1)


def _classified_vjp(dy, inputs, parameters, settings):
    gradient, rows = np.zeros_like(inputs[0]), _read(inputs[0], settings)
    gradient[:, rows] = dy[:, None] / len(rows)
    return [gradient], {}


def _read(hidden, settings) -> list[int]:
    """The positions that a classifier reads."""
    place, length = settings["place"], hidden.shape[1]
    return list(class_rows(place, length - len(NAMES[place]))) or list(range(length))


NODES = {
    "patch_embedding": stateless(_patch_embedding, _patch_embedding_vjp),
    "image_tokens": stateless(_image_tokens, _image_tokens_vjp),
    "classified": stateless(_classified, _classified_vjp),
}
