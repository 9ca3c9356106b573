"""The GPU kernels that the backends share, without a framework.

`launch` says how the selective scan's kernels are compiled, laid out over a GPU and called. `causal_conv` says the same
of the convolution's. `nvrtc` compiles CUDA C++, and `driver` launches it.
"""
