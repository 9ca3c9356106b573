"""PyTorch's own differentiation of the plain scan, in float64, against the gradients that the reference has by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mamba_core import registry
from mamba_core.spec.ops import selective_scan as scan_spec
from mamba_core.spec.tolerances import relative_l2
from tests.conformance.strategies import op_cases

torch = pytest.importorskip("torch")

LIMIT = 1e-10


@given(case=op_cases("selective_scan", st.sampled_from((0, 1, 2, 17, 40))), seed=st.integers(0, 2**32 - 1))
def test_reference_gradients_equal_autograd_of_the_sequential_kernel(case, seed):
    backend = registry.get("torch")
    arrays = {name: value.astype(np.float64) for name, value in case.arrays.items()}
    positions = {name: backend.from_numpy(value, device="cpu") for name, value in case.positions.items()}

    def scan(*values):
        named = dict(zip(arrays, values, strict=True))
        return backend.op("selective_scan").selective_scan(
            **named, **positions, **case.options, return_final_state=True, kernel="sequential"
        )

    expected = scan_spec.selective_scan(**arrays, **case.positions, **case.options, return_final_state=True)
    rng = np.random.default_rng(seed)
    cotangents = [rng.normal(size=value.shape) for value in expected]
    tensors, directions = ([torch.from_numpy(value) for value in values] for values in (arrays.values(), cotangents))
    outputs, gradients = backend.vjp(scan, tensors, directions)
    ours = scan_spec.selective_scan_vjp(*cotangents, **arrays, **case.positions, **case.options)
    for name, value, reference in zip(("y", "final state"), outputs, expected, strict=True):
        assert relative_l2(reference, value) <= LIMIT, name
    for name, gradient in zip(arrays, gradients, strict=True):
        assert gradient.dtype == np.float64
        assert relative_l2(ours[name], gradient) <= LIMIT, name
