"""The PyTorch backend: CPU, CUDA and MPS. Models are `torch.nn.Module`s."""

from mamba_core.backends.torch.arrays import devices, from_numpy, keep_freed_memory, peak_memory, to_numpy, vjp
from mamba_core.backends.torch.conv import causal_conv, causal_conv_step
from mamba_core.backends.torch.decode import choose, decode, distribution, fork, prefill
from mamba_core.backends.torch.kernels.quantized import quantize
from mamba_core.backends.torch.scan import kernels, selective_scan, selective_step
from mamba_core.backends.torch.train import Trainer, loss_and_gradients
from mamba_core.backends.torch.weights import build, parameters

__all__ = ["TorchBackend", "backend", "quantize"]


class TorchBackend:
    """`mamba_core.backend.Backend` for PyTorch."""

    name = "torch"

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


backend = TorchBackend()
keep_freed_memory()
