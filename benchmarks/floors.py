"""What no candidate could beat: the least work that the machine must do, timed as the candidates are."""

from mamba_core.backends.native import library
from mamba_core.benchmarks.cases import Case
from mamba_core.benchmarks.frameworks import Timed
from mamba_core.spec.params import parameter_table
from mamba_core.weights.formats import count_bytes

CHUNK = 64  # positions


def arithmetic(case: Case) -> Timed:
    """A forward's exponentials, products and sums by the native library, on nothing that comes from memory.

    Raises:
        ImportError: there is no native library.
    """
    if reason := library.missing():
        raise ImportError(f"the native kernels: {reason}")
    return Timed(lambda: library.scan_floor(1, case.length, case.config.d_inner, case.config.d_state), None)


def weights(case: Case) -> Timed:
    """Every parameter's bytes read once for each token, by as many threads as the frameworks have; needs torch."""
    import torch

    table = parameter_table(case.config).values()
    size = sum(count_bytes(parameter.shape, parameter.dtype(case.dtype)) for parameter in table)
    # Values do not matter, and as float32 torch reads them at the speed of the memory.
    flat = torch.ones(size // 4)

    @torch.inference_mode()
    def call():
        for _ in range(case.parts):
            flat.sum()

    return Timed(call, None)


def products(case: Case) -> Timed:
    """The matrix products of Mamba-2's recurrence in chunks, and nothing between them; needs torch.

    Of every chunk: C with B of each group, those with x of each head, and the state's with B and C. The last chunk is
    whole here.
    """
    import torch

    (h, p, n), g = case.state, case.config.ngroups
    chunks = -(-case.length // CHUNK)
    B, x = torch.ones(chunks * g, CHUNK, n), torch.ones(chunks * h, CHUNK, p)
    of_heads, weights = torch.ones(chunks * h, CHUNK, n), torch.ones(chunks * h, CHUNK, CHUNK)
    state = torch.ones(chunks * h, p, n)

    @torch.inference_mode()
    def call():
        return B @ B.mT, weights @ x, x.mT @ of_heads, of_heads @ state.mT

    return Timed(call, None)


FLOORS = {"arithmetic": arithmetic, "products": products, "weights": weights}
