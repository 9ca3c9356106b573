"""What no candidate could beat: the least work that the machine must do, timed as the candidates are."""

import ctypes

import numpy as np

from mamba_core.backends import native
from mamba_core.benchmarks.cases import Case, scan_inputs
from mamba_core.benchmarks.frameworks import Timed
from mamba_core.spec.params import parameter_table
from mamba_core.weights.formats import count_bytes


def exponentials(case: Case) -> Timed:
    """The exponentials exp(delta A) of a forward, one for each position, channel and state, by the native library.

    Raises:
        ImportError: there is no native library, or it has no such function.
    """
    if reason := native.missing():
        raise ImportError(f"the native kernels: {reason}")
    if not hasattr(native.library(), "mamba_scan_floor"):
        raise ImportError("the native library has no mamba_scan_floor")
    inputs = scan_inputs(case) | {"y": np.empty((1, case.length, case.config.d_inner), np.float32)}
    sizes = (1, case.length, case.config.d_inner, case.config.d_state)
    arguments = native.Scan(*sizes, False, False, native.threads())
    for name in native.FIELDS & inputs.keys() - {"dy"}:
        array = inputs[name]
        pointer, strides = array.ctypes.data, (stride // array.itemsize for stride in array.strides[:2])
        setattr(arguments, name, native.Sequence(pointer, *strides) if name in native.SEQUENCES else pointer)
    function = native.library().mamba_scan_floor
    function.argtypes = [ctypes.POINTER(native.Scan)]

    def call():
        if function(ctypes.byref(arguments)):
            raise MemoryError("no memory for the workspace of mamba_scan_floor")
        return inputs  # what the pointers point to

    return Timed(call, None)


def weights(case: Case) -> Timed:
    """Every parameter's bytes read once for each token, by as many threads as the frameworks have; needs torch."""
    import torch

    # Values do not matter, and as float32 torch reads them at the speed of the memory.
    flat = [
        torch.ones(-(-count_bytes(parameter.shape, parameter.dtype(case.dtype)) // 4))
        for parameter in parameter_table(case.config).values()
    ]

    @torch.inference_mode()
    def call():
        for _ in range(case.parts):
            for parameter in flat:
                parameter.sum()

    return Timed(call, None)


FLOORS = {"exponentials": exponentials, "weights": weights}
