"""exp as exact on a CPU as on a GPU."""

import mlx.core as mx

from mamba_core.backends.mlx.arrays import default_device


def exp(value: mx.array) -> mx.array:
    """exp in float32, by MLX's own where that is exact."""
    return _exp(value) if default_device() == "cpu" else mx.exp(value)


@mx.compile
def _exp(value):
    """exp in float32 to 1e-7 of its value. MLX's own takes four times as long on a CPU and errs up to 4e-6.

    exp(value) = 2^k exp(f), k a whole number, |f| <= ln(2) / 2. Zero below 2^-126, Inf from 2^127.5.
    """
    value = mx.clip(value, -88.0, 89.0)
    # Adding 1.5 * 2^23 leaves the nearest whole number in the last bits of the sum.
    shifted = value * 1.4426950408889634 + 12582912.0
    k = shifted - 12582912.0
    f = (value - k * 0.693359375) + k * 2.12194440e-4
    # 1 + f + f^2 q(f), q fitted so that the largest relative error is least.
    q = (0.0013814467 * f + 0.0083687804) * f + 0.041668394
    q = (q * f + 0.1666652) * f + 0.49999993
    series = (q * f + 1.0) * f + 1.0
    power = ((shifted.view(mx.int32) - (0x4B400000 - 127)) << 23).view(mx.float32)
    return series * power
