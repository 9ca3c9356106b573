"""The structs that the native library's functions take."""

import ctypes

# The version of these structs and of the library's functions. The library reports the version that it was built with.
ABI = 11

# Of the arrays that the library computes on.
DTYPES = ("float32", "bfloat16")

_int64, _int32, _pointer = ctypes.c_int64, ctypes.c_int32, ctypes.c_void_p


class Sequence(ctypes.Structure):
    """An array (b, l, channels) whose channels lie side by side. `batch` and `position` are its strides in elements."""

    _fields_ = (("data", _pointer), ("batch", _int64), ("position", _int64))


def _fields(kind, names: str):
    return [(name, kind) for name in names.split()]


class Scan(ctypes.Structure):
    """The arguments of a scan and of its gradient, as `scan.h` documents them."""

    _fields_ = (
        *_fields(_int64, "b l e n"),
        *_fields(_int32, "bfloat16 delta_softplus threads width"),
        *_fields(Sequence, "x delta z B C"),
        *_fields(_pointer, "A D delta_bias initial_state mask restart"),
        *_fields(Sequence, "y"),
        *_fields(_pointer, "final_state boundaries"),
        *_fields(Sequence, "dy"),
        *_fields(_pointer, "dfinal_state"),
        *_fields(Sequence, "dx ddelta dz dB dC"),
        *_fields(_pointer, "dA dD ddelta_bias dinitial_state"),
    )


class Ssd(ctypes.Structure):
    """The arguments of an ssd and of its gradient, as `scan.h` documents them."""

    _fields_ = (
        *_fields(_int64, "b l h p n g"),
        *_fields(_int32, "bfloat16 dt_softplus D_per_channel threads width"),
        *_fields(ctypes.c_float, "least most"),
        *_fields(Sequence, "x dt z B C"),
        *_fields(_pointer, "A D dt_bias initial_state mask restart"),
        *_fields(Sequence, "y"),
        *_fields(_pointer, "final_state boundaries"),
        *_fields(Sequence, "dy"),
        *_fields(_pointer, "dfinal_state"),
        *_fields(Sequence, "dx ddt dz dB dC"),
        *_fields(_pointer, "dA dD ddt_bias dinitial_state"),
    )


class Conv(ctypes.Structure):
    """The arguments of a causal convolution and of its gradient, as `scan.h` documents them."""

    _fields_ = (
        *_fields(_int64, "b l e k"),
        *_fields(_int32, "bfloat16 silu threads width"),
        *_fields(Sequence, "x"),
        *_fields(_pointer, "weight bias initial_state mask restart"),
        *_fields(Sequence, "y"),
        *_fields(_pointer, "final_state"),
        *_fields(Sequence, "dy"),
        *_fields(_pointer, "dfinal_state"),
        *_fields(Sequence, "dx"),
        *_fields(_pointer, "dweight dbias dinitial_state"),
    )


class Matrix(ctypes.Structure):
    """A weight (outputs, inputs), or (inputs, outputs) where the step says `transposed`, and a bias or None."""

    _fields_ = _fields(_pointer, "weight bias")


class MambaStep(ctypes.Structure):
    """The arguments of a residual block with a Mamba-1 mixer at one position, as `steps.h` documents them.

    `selection_eps` is 0 unless it is given, and the step then norms neither dt nor B nor C.
    """

    _fields_ = (
        *_fields(_int64, "b d e n k r"),
        *_fields(_int32, "bfloat16 residual_bfloat16 transposed threads width"),
        *_fields(ctypes.c_float, "eps"),
        *_fields(_pointer, "residual conv_state ssm_state norm"),
        *_fields(Matrix, "in_proj conv x_proj out_proj"),
        *_fields(_pointer, "dt_proj delta_bias A_log D"),
        *_fields(_pointer, "new_residual new_conv_state new_ssm_state"),
        *_fields(_pointer, "dt_norm B_norm C_norm"),
        *_fields(ctypes.c_float, "selection_eps"),
    )


class SsdStep(ctypes.Structure):
    """The arguments of a residual block whose recurrence is the ssd at one position, as `steps.h` documents them."""

    _fields_ = (
        *_fields(_int64, "b d h p n g k beside"),
        *_fields(_int32, "bfloat16 residual_bfloat16 transposed threads width D_per_channel norm_before_gate"),
        *_fields(ctypes.c_float, "eps gated_eps least most"),
        *_fields(_pointer, "residual conv_state ssm_state norm"),
        *_fields(Matrix, "in_proj conv out_proj"),
        *_fields(_pointer, "dt_bias A_log D gated_norm"),
        *_fields(_pointer, "new_residual new_conv_state new_ssm_state"),
    )


class LinearStep(ctypes.Structure):
    """The arguments of a product with a matrix, as `steps.h` documents them."""

    _fields_ = (
        *_fields(_int64, "b inputs outputs"),
        *_fields(_int32, "bfloat16 transposed threads width"),
        *_fields(_pointer, "x"),
        *_fields(Matrix, "matrix"),
        *_fields(_pointer, "y"),
    )


class ExpertsStep(ctypes.Structure):
    """The arguments of a few rows by their experts, as `steps.h` documents them."""

    _fields_ = (
        *_fields(_int64, "b d i k experts"),
        *_fields(_int32, "bfloat16 threads width unused"),
        *_fields(_pointer, "x chosen probability gate_up down y"),
    )


class AddNorm(ctypes.Structure):
    """The arguments of a sum and its norm, as `scan.h` documents them."""

    _fields_ = (
        *_fields(_int64, "rows d"),
        *_fields(_int32, "bfloat16 residual_bfloat16 threads width"),
        *_fields(ctypes.c_float, "eps"),
        *_fields(_pointer, "residual hidden weight normed total"),
    )


# The fields that are a `Sequence`.
SEQUENCES = frozenset(name for kinds in (Scan, Ssd, Conv) for name, kind in kinds._fields_ if kind is Sequence)
