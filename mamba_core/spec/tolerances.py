"""The one table of tolerances: the relative L2 error against the float64 reference that is allowed.

relative L2 is ||value - reference|| / ||reference||. The float32 numbers for values and gradients are the project's
requirement; an inner node may have more than the logits, because some are differences of larger numbers (a projection
of 512 products rounds to 3e-7, and there are four in a layer). Those of half precision follow from its rounding at
every projection (2^-9 for bfloat16, 2^-12 for float16), in a model of a few layers.

The table is for models of up to LAYERS layers. Each layer adds its own rounding to the residual stream, independent of
the others', so that the error of a deeper model grows like a random walk: with the square root of the layers passed.
In mamba-130m the errors after 24 layers are 1.6 to 1.8 times those after 4, where the root allows 2.4.
"""

import numpy as np

TOLERANCES = {
    "float64": {"value": 1e-12, "node": 3e-12, "gradient": 1e-11},
    "float32": {"value": 1e-6, "node": 3e-6, "gradient": 1e-5},
    "float16": {"value": 4e-3, "node": 1e-2, "gradient": 2e-2},
    "bfloat16": {"value": 2e-2, "node": 5e-2, "gradient": 1e-1},
}
LAYERS = 4


def tolerance(dtype: str, kind: str = "value", layers: int = 0) -> float:
    """The relative L2 error that is allowed.

    Args:
        kind: "value" for results and states, "node" for inner nodes of the graph, "gradient" for gradients.
        layers: how many layers the value has passed through.
    """
    return TOLERANCES[dtype][kind] * max(1.0, layers / LAYERS) ** 0.5


def relative_l2(value, reference) -> float:
    """||value - reference|| / ||reference||, in float64; inf if value is not finite, absolute if reference is zero."""
    value = np.asarray(value).astype(np.float64)
    reference = np.asarray(reference).astype(np.float64)
    if value.shape != reference.shape:
        raise ValueError(f"shapes differ: {value.shape} against {reference.shape}")
    if not np.isfinite(value).all():
        return float("inf")
    scale = float(np.linalg.norm(reference))
    return float(np.linalg.norm(value - reference)) / (scale if scale > 0 else 1.0)
