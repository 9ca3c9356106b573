"""Programs compiled ahead of time for a TPU that is not there, by libtpu, in a process of their own."""

import os
import subprocess
import sys
import textwrap

import pytest

TOPOLOGIES = ("v4:2x2x1", "v5e:2x2", "v6e:2x2")
BEFORE = """
import jax, jax.numpy as jnp
from jax.experimental import topologies

device = topologies.get_topology_desc(platform="tpu", topology_name="{topology}").devices[0]
place = jax.sharding.SingleDeviceSharding(device)

def shaped(*shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

def compile(function, *arrays):
    jax.jit(function).trace(*arrays).lower(lowering_platforms=("tpu",)).compile()
"""


def check_that_it_compiles(topology: str, code: str) -> None:
    """code: calls `compile(function, *arrays)` with arrays of `shaped(*shape, dtype=)`. Skips without libtpu."""
    libtpu = pytest.importorskip("libtpu")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    environment |= {
        "TPU_WORKER_ID": "0",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_LIBRARY_PATH": os.path.join(libtpu.__path__[0], "libtpu.so"),
    }
    program = "\n".join([BEFORE.format(topology=topology), textwrap.dedent(code), 'print("compiled")'])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert "compiled" in done.stdout, done.stderr
