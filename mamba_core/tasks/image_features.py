"""Models of images without a head: the normalised residual stream of the patches and the class tokens."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mamba_core.architectures.base import is_bool, is_size
from mamba_core.spec.graph import NOTHING, Node
from mamba_core.spec.images import NAMES, PLACES, Pair, grid
from mamba_core.spec.init import lecun_normal, normal, zeros
from mamba_core.spec.ops.base import expect_floats, expect_rows, shape_of
from mamba_core.spec.params import Parameter
from mamba_core.tasks import base

IMAGES = "images"
SPREAD = 0.02  # of the initial class tokens and positions
PATCH, POSITIONS = "patch_embed", "pos_embed"


@dataclass(frozen=True)
class Task(base.Task):
    """Its inputs are images (b, channels, height, width) of any height and width of at least a patch, as floats.

    Attributes:
        image_size: height and width, or one number for both, for which the model has positions. Those of another size
            are interpolated.
        patch_size, stride: of the patches, the same way; the stride is the patch's size where it is None.
        channels: of an image.
        class_token: where it stands, one of `mamba_core.spec.images.PLACES`: in the middle of the patches, before them,
            one at either end, or "none".
        class_first: interpolate positions as the original's code does, which takes the first row for that of the class
            token, wherever this stands.
    """

    image_size: int | Pair = 224
    patch_size: int | Pair = 16
    stride: int | Pair | None = None
    channels: int = 3
    class_token: str = "middle"
    class_first: bool = False

    inputs: ClassVar[str] = IMAGES

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size", "stride"):
            value = getattr(self, name)
            pair = value if isinstance(value, tuple) else (value, value)
            if not (len(pair) == 2 and all(map(is_size, pair))) and (name, value) != ("stride", None):
                raise ValueError(f"{name} is {value!r}; expected a size, or the two of height and width")
        if not is_size(self.channels):
            raise ValueError(f"channels is {self.channels!r}; expected a size")
        if self.class_token not in PLACES:
            raise ValueError(f"class_token is {self.class_token!r}; expected one of {', '.join(PLACES)}")
        if not is_bool(self.class_first):
            raise ValueError(f"class_first is {self.class_first!r}; expected true or false")
        self._check_size(self.size, "image_size")

    @property
    def size(self) -> Pair:
        """Height and width of the image that the positions are for."""
        return _pair(self.image_size)

    @property
    def patch(self) -> Pair:
        return _pair(self.patch_size)

    @property
    def steps(self) -> Pair:
        """The strides from a patch to the next one, downwards and to the right."""
        return self.patch if self.stride is None else _pair(self.stride)

    @property
    def grid(self) -> Pair:
        """Patches in a column and in a row of that image."""
        return grid(self.size, self.patch, self.steps)

    def before(self, config: Any) -> Iterator[Parameter]:
        d, (i, j), (rows, columns) = config.d_model, self.patch, self.grid
        names = NAMES[self.class_token]
        scale = lecun_normal(self.channels * i * j)
        yield Parameter(f"{PATCH}.weight", "dcij", (d, self.channels, i, j), scale, mup_role="input")
        yield Parameter(f"{PATCH}.bias", "d", (d,), zeros, decay=False)
        for name in names:
            yield Parameter(name, "11d", (1, 1, d), normal(SPREAD), decay=False)
        yield Parameter(POSITIONS, "1ld", (1, rows * columns + len(names), d), normal(SPREAD), decay=False)

    def opening(self, config: Any) -> Iterator[Node]:
        weights = {"weight": f"{PATCH}.weight", "bias": f"{PATCH}.bias"}
        yield Node(PATCH, "patch_embedding", (IMAGES,), weights, {"stride": self.steps})
        sizes = {"grid": self.grid, "patch": self.patch, "stride": self.steps}
        settings = {"place": self.class_token, "class_first": self.class_first, **sizes}
        named = {name: name for name in NAMES[self.class_token]} | {"positions": POSITIONS}
        yield Node("embedding", "image_tokens", (PATCH, IMAGES), named, settings)

    def given(self, inputs: Any, inputs_embeds: Any) -> tuple[Any, str]:
        if inputs_embeds is not None or inputs is None:
            raise TypeError(f"expected {IMAGES}; {'none' if inputs is None else base.EMBEDS} given")
        return inputs, IMAGES

    def check(
        self,
        config: Any,
        inputs: Any,
        mask: Any,
        segment_ids: Any,
        kind: str | None = None,
        extras: Mapping[str, Any] = NOTHING,
    ) -> None:
        batch, channels, *size = shape_of(IMAGES, inputs, ("b", "channels", "height", "width"))
        expect_rows(IMAGES, batch)
        if channels != self.channels:
            raise ValueError(
                f"{IMAGES} has shape {tuple(inputs.shape)}; expected (b, channels, height, width) of "
                f"{self.channels} channels"
            )
        expect_floats({IMAGES: inputs})
        self._check_size(tuple(size), IMAGES)
        if mask is not None or segment_ids is not None:
            raise ValueError("every patch of an image counts, and a row is one image; give no mask and no segment_ids")
        if extras:
            raise TypeError(f"a model of task {config.task!r} has no argument {', '.join(extras)}")

    def check_values(self, config: Any, inputs: Any, mask: Any, extras: Mapping[str, Any] = NOTHING) -> None:
        """A colour may be any number."""

    def positions(self, inputs: Any) -> int:
        rows, columns = grid(inputs.shape[2:], self.patch, self.steps)
        return rows * columns + len(NAMES[self.class_token])

    def beginning(self, config: Any, inputs: Any, kind: str) -> np.ndarray:
        return np.asarray(inputs).astype(np.float64)

    def draw(self, config: Any, rng: np.random.Generator, batch: int, length: int) -> np.ndarray:
        """Random images of the model's own size, (b, channels, height, width) float32, whatever the length is."""
        return rng.standard_normal((batch, self.channels, *self.size), dtype=np.float32)

    def _check_size(self, size: tuple[int, ...], name: str) -> None:
        if any(of < own for of, own in zip(size, self.patch, strict=True)):
            raise ValueError(f"{name} has {size[0]} rows and {size[1]} columns, fewer than a patch, {self.patch}")


def _pair(value: Any) -> Pair:
    return value if isinstance(value, tuple) else (value, value)
