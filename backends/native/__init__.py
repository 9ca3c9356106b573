"""The CPU kernels in C++ that the backends share.

`abi` has the structs that the kernels take, and `library` finds, loads and calls the kernels. They are an optional part
of the package's build: without a C++ compiler the backends compute by their frameworks' own operations.
"""
