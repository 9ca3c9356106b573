"""Every way of calling an MLX model."""

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten


def on_every_path(model, ids: np.ndarray) -> list[np.ndarray]:
    """Whole, masked, packed, both, in chunks, and position by position; ids (b, 21)."""
    rng = np.random.default_rng(1)
    mask, segments = mx.array(rng.random(ids.shape) > 0.3), mx.array(np.sort(rng.integers(0, 5, ids.shape)))
    ids = mx.array(ids)
    found = [*model(ids), *model(ids, mask=mask), *model(ids, segment_ids=segments)]
    found += model(ids, mask=mask, segment_ids=segments)
    state, pieces = None, []
    for part in (slice(0, 2), slice(2, 12), slice(12, 13), *(slice(at, at + 1) for at in range(13, 21))):
        logits, state = model(ids[:, part], state)
        pieces.append(logits)
    found += [mx.concatenate(pieces, axis=1), state]
    return [np.array(value.astype(mx.float32)) for _, value in tree_flatten(found)]
