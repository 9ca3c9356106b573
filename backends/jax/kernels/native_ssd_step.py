"""One position of residual blocks whose recurrence is the ssd in one native call on a CPU."""

from mamba_core.backends.jax.kernels.native_step import Kind
from mamba_core.backends.native import abi


def _sizes(residual, operands: dict) -> tuple[tuple[str, int], ...]:
    (b, _, d), (_, h, p, n) = residual.shape, operands["ssm_state"].shape
    k, _, filters = operands["conv.weight"].shape
    sizes = {"b": b, "d": d, "h": h, "p": p, "n": n, "g": (filters - h * p) // (2 * n), "k": k}
    sizes |= {"beside": len(operands["out_proj.weight"]) - h * p, "D_per_channel": int(len(operands["D"]) > h)}
    return tuple(sizes.items())


def _shapes(b, d, h, p, n, g, k, beside, D_per_channel) -> dict[str, tuple[int, ...]]:
    e = h * p
    filters = e + 2 * g * n
    return {
        "norm": (d,),
        "in_proj.weight": (d, 2 * beside + e + filters + h),
        "in_proj.bias": (2 * beside + e + filters + h,),
        "conv.weight": (k, 1, filters),
        "conv.bias": (filters,),
        "dt_bias": (h,),
        "A_log": (h,),
        "D": (e if D_per_channel else h,),
        "gated_norm": (e,),
        "out_proj.weight": (beside + e, d),
        "out_proj.bias": (d,),
        "conv_state": (b, k - 1, filters),
        "ssm_state": (b, h, p, n),
    }


# Without the norm there is the gate alone.
OPTIONAL = frozenset({"in_proj.bias", "conv.bias", "gated_norm", "out_proj.bias"})
FLOAT32 = frozenset({"dt_bias", "A_log", "D", "ssm_state"})
KIND = Kind("ssd_steps", abi.SsdStep, _sizes, _shapes, OPTIONAL, FLOAT32)
