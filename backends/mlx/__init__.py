"""The MLX backend: Apple silicon, CUDA and CPU. Models are `mlx.nn.Module`s."""

import os

# Float32 is float32, as on the other backends: unless told so MLX rounds the factors of products to TF32 on GPUs that
# have it. It looks at this when it first multiplies.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

from mamba_core.backends.mlx.arrays import devices, from_numpy, peak_memory, to_numpy, vjp
from mamba_core.backends.mlx.conv import causal_conv, causal_conv_step
from mamba_core.backends.mlx.decode import choose, decode, distribution, fork, prefill
from mamba_core.backends.mlx.scan import kernels, selective_scan, selective_step
from mamba_core.backends.mlx.train import Trainer, loss_and_gradients
from mamba_core.backends.mlx.weights import build, parameters


class MlxBackend:
    """`mamba_core.backend.Backend` for MLX."""

    name = "mlx"

    def op(self, name):  # TODO(merge)
        import types

        return types.SimpleNamespace(
            selective_scan=selective_scan,
            selective_step=selective_step,
            causal_conv=causal_conv,
            causal_conv_step=causal_conv_step,
        )

    selective_scan = staticmethod(selective_scan)
    selective_step = staticmethod(selective_step)
    causal_conv = staticmethod(causal_conv)
    causal_conv_step = staticmethod(causal_conv_step)
    devices = staticmethod(devices)

    def kernels(self, device=None):  # TODO(merge)
        found = kernels(device)
        return {"selective_scan": found, "causal_conv": found}

    from_numpy = staticmethod(from_numpy)
    to_numpy = staticmethod(to_numpy)
    peak_memory = staticmethod(peak_memory)
    vjp = staticmethod(vjp)
    build = staticmethod(build)
    parameters = staticmethod(parameters)
    loss_and_gradients = staticmethod(loss_and_gradients)
    prefill = staticmethod(prefill)
    fork = staticmethod(fork)
    choose = staticmethod(choose)
    distribution = staticmethod(distribution)
    decode = staticmethod(decode)
    trainer = staticmethod(Trainer)


backend = MlxBackend()
