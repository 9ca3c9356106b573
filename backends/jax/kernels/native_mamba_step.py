"""One position of residual blocks with Mamba-1's mixer in one native call on a CPU."""

from mamba_core.backends.jax.kernels.native_step import Kind
from mamba_core.backends.native import abi


def _sizes(residual, operands: dict) -> tuple[tuple[str, int], ...]:
    (b, _, d), (e, n) = residual.shape, operands["A_log"].shape
    sizes = {"b": b, "d": d, "e": e, "n": n}
    return tuple((sizes | {"k": len(operands["conv.weight"]), "r": len(operands["dt_proj"])}).items())


def _shapes(b, d, e, n, k, r) -> dict[str, tuple[int, ...]]:
    return {
        "norm": (d,),
        "in_proj.weight": (d, 2 * e),
        "in_proj.bias": (2 * e,),
        "conv.weight": (k, 1, e),
        "conv.bias": (e,),
        "x_proj.weight": (e, r + 2 * n),
        "dt_proj": (r, e),
        "delta_bias": (e,),
        "A_log": (e, n),
        "D": (e,),
        "out_proj.weight": (e, d),
        "out_proj.bias": (d,),
        "conv_state": (b, k - 1, e),
        "ssm_state": (b, e, n),
    }


OPTIONAL = frozenset({"in_proj.bias", "conv.bias", "out_proj.bias"})
FLOAT32 = frozenset({"delta_bias", "A_log", "D", "ssm_state"})
# selection_eps: of the norms without weight that dt, B and C pass before dt_proj; 0 where there are none.
KIND = Kind("mamba_steps", abi.MambaStep, _sizes, _shapes, OPTIONAL, FLOAT32)
