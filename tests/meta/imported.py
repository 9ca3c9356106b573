"""What a run on a mutant imports, for the process that is forked: the frameworks, pytest, the core, and no backend."""

import contextlib
import gc
import importlib

for name in ("pytest", "hypothesis.strategies", "tests.conformance.subjects", "torch", "mlx.nn", "mlx.optimizers"):
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
# pytest collects garbage several times, which need not look at all of torch.
gc.freeze()
