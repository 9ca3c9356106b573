"""The one table of tolerances: the relative L2 error against the float64 reference that is allowed.

relative L2 is ||value - reference|| / ||reference||. The float32 numbers are the project's requirement (1e-6 for values,
1e-5 for gradients). The others follow from the rounding of the compute dtype (2^-9 for bfloat16, 2^-12 for
float16) at every projection, in a model of a few layers.
"""

import numpy as np

TOLERANCES = {
    "float64": {"value": 1e-12, "gradient": 1e-11},
    "float32": {"value": 1e-6, "gradient": 1e-5},
    "float16": {"value": 4e-3, "gradient": 2e-2},
    "bfloat16": {"value": 2e-2, "gradient": 1e-1},
}


def tolerance(dtype: str, kind: str = "value") -> float:
    """kind: "value" for outputs, states and nodes, "gradient" for gradients."""
    return TOLERANCES[dtype][kind]


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
