"""How an image becomes a sequence: the grid of its patches, the class tokens among them, and the table of positions.

Patches are counted row by row. A class token is a learnt vector among them, in whose place a classifier reads.
"""

import functools

import numpy as np

# Where class tokens stand: in the middle of the patches, before them, at both ends, or nowhere.
PLACES = ("middle", "first", "double", "none")
NAMES = {"middle": ("cls_token",), "first": ("cls_token",), "double": ("cls_token_head", "cls_token_tail"), "none": ()}
# Of the cubic convolution that interpolates (Keys 1981), as PyTorch's bicubic mode has it.
SHARPNESS = -0.75

Pair = tuple[int, int]


def grid(size: Pair, patch: Pair, stride: Pair) -> Pair:
    """Patches in a column and in a row, of an image of so many rows and columns; what is left over is not read."""
    rows, columns = ((of - own) // step + 1 for of, own, step in zip(size, patch, stride, strict=True))
    return rows, columns


def class_rows(place: str, patches: int) -> tuple[int, ...]:
    """The positions of the class tokens in the sequence of so many patches."""
    return {"middle": (patches // 2,), "first": (0,), "double": (0, patches + 1), "none": ()}[place]


def patch_rows(place: str, patches: int) -> np.ndarray:
    """Those of the patches."""
    return np.delete(np.arange(patches + len(NAMES[place])), list(class_rows(place, patches)))


@functools.lru_cache(maxsize=32)
def positions(place: str, table: Pair, shown: Pair, class_first: bool) -> np.ndarray | None:
    """A matrix (positions of the image, rows of the table) float64 that interpolates a table of positions.

    The grid of the table's patches becomes that of the image by a bicubic interpolation, and a class token keeps its
    row. None where the grids are the same.

    class_first: the first rows of both are those of class tokens, wherever they stand, as in the original's code.
    """
    if table == shown:
        return None
    rows, columns = (_cubic(own, wanted) for own, wanted in zip(table, shown, strict=True))
    inner = np.kron(rows, columns)
    count = len(NAMES[place])
    found = np.zeros((inner.shape[0] + count, inner.shape[1] + count))
    # The rows of class tokens, of the image and of the table, and those of patches.
    rows_of = [tuple(range(count)) if class_first else class_rows(place, size) for size in inner.shape]
    for shown_row, table_row in zip(*rows_of, strict=True):
        found[shown_row, table_row] = 1.0
    of_patches = [np.delete(np.arange(size), list(own)) for size, own in zip(found.shape, rows_of, strict=True)]
    found[np.ix_(*of_patches)] = inner
    found.setflags(write=False)
    return found


def _cubic(count: int, wanted: int) -> np.ndarray:
    """(wanted, count): so many samples of `count` samples of a line, whose ends are repeated."""
    found = np.zeros((wanted, count))
    for index in range(wanted):
        at = (index + 0.5) * count / wanted - 0.5
        first = int(np.floor(at))
        for sample in range(first - 1, first + 3):
            found[index, min(max(sample, 0), count - 1)] += _weight(abs(at - sample))
    return found


def _weight(distance: float) -> float:
    """Of a sample at that distance."""
    a, d = SHARPNESS, distance
    if d <= 1:
        return ((a + 2) * d - (a + 3)) * d * d + 1
    return ((a * d - 5 * a) * d + 8 * a) * d - 4 * a if d < 2 else 0.0
