"""The JAX backend: CPU, GPU and TPU. Models are `flax.nnx.Module`s."""

from mamba_core.backends.jax.arrays import devices, from_numpy, peak_memory, to_numpy, vjp
from mamba_core.backends.jax.conv import causal_conv, causal_conv_step
from mamba_core.backends.jax.decode import choose, decode, distribution, fork, prefill
from mamba_core.backends.jax.scan import kernels, selective_scan, selective_step
from mamba_core.backends.jax.train import Trainer, loss_and_gradients
from mamba_core.backends.jax.weights import build, parameters


class JaxBackend:
    """`mamba_core.backend.Backend` for JAX."""

    name = "jax"

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


backend = JaxBackend()
