"""Where things live: no architecture's name outside its own files, and the same files and functions in each backend."""

import ast
import re
from pathlib import Path

import pytest

from mamba_core import architectures
from mamba_core.kernels import OF_SOME
from mamba_core.spec import state as states
from mamba_core.spec.dims import LETTERS
from mamba_core.spec.params import parameter_table
from tests.conformance.cases import cases
from tests.conformance.subjects import SUBJECTS

ROOT = Path(__file__).parents[2]
# Where an architecture's own files are. The name of a library's layout may be one of an architecture too.
OWN = (
    "mamba_core/architectures/",
    "weights/tables/",
    "weights/layouts/",
    *(f"backends/{name}/mixers/" for name in ("torch", "mlx", "jax")),
    "mamba_core/compat/",  # the names of other packages
)
BACKENDS = ("torch", "mlx", "jax")
# file: why a backend has it and another has not.
ALONE = {
    "torch/private.py": "PyTorch's private API; the others need none",
    "torch/quantization.py": "MLX has `nn.quantize`, and JAX has qwix",
    "torch/ops/fused_mixer.py": "one kernel for what stands between two projections; XLA and MLX fuse",
    "torch/ops/gated_norm.py": "one kernel for a norm and its gate; XLA and MLX fuse",
    "torch/ops/swiglu.py": "one kernel for a gate and what passes it; XLA and MLX fuse",
    "torch/ops/block_step.py": "one position in one native call; MLX calls nothing native inside its graphs",
    "jax/ops/block_step.py": "as for torch",
    "mlx/ops/ssd_step.py": "one position of a recurrence in one kernel; torch's and JAX's are of whole blocks",
    "torch/ways/native_step.py": "as its op",
    "jax/ways/native_step.py": "as its op",
    "jax/programs.py": "a compiled program of JAX is a function, out of which must come what a call changes",
    "torch/ways/fused.py": "a block's sum and the next norm are one kernel; XLA and MLX fuse them by themselves",
    "torch/ways/cuda_step.py": "kernels in Triton for one position",
}
# Folders whose files are a machine's, and may differ.
OF_THE_MACHINE = ("kernels",)


def sources(*folders):
    for folder in folders:
        yield from sorted((ROOT / folder).rglob("*.py"))


def names_of_others() -> list[str]:
    """The architectures whose names are no everyday word of this project."""
    return [name for name in architectures.names() if name != "mamba"]


@pytest.mark.parametrize("name", names_of_others())
def test_an_architecture_is_named_in_its_own_files_only(name):
    spelled = re.compile(rf"\b{name}\b|\b{name.replace('_', '')}", re.IGNORECASE)
    found = {
        f"{path.relative_to(ROOT)}:{number}"
        for path in sources("mamba_core", "backends", "weights")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if spelled.search(line) and not str(path.relative_to(ROOT)).startswith(OWN)
    }
    assert not found, f"{name} stands in {', '.join(sorted(found))}"


def test_no_engine_knows_a_config_class():
    """What reads any architecture names no class of one."""
    configs = {config.__name__ for config in architectures.configs()}
    engines = [
        path
        for path in sources("mamba_core/spec", "mamba_core/tasks", "backends", "weights")
        if not str(path.relative_to(ROOT)).startswith(OWN)
    ]
    for path in engines:
        words = set(re.findall(r"\w+", path.read_text()))
        assert not words & configs, f"{path.relative_to(ROOT)} names {words & configs}"


def files(backend: str) -> set[str]:
    folder = ROOT / "backends" / backend
    found = (str(path.relative_to(folder)) for path in folder.rglob("*.py"))
    return {name for name in found if not name.startswith(OF_THE_MACHINE)}


def test_the_backends_have_the_same_files():
    every = set().union(*map(files, BACKENDS))
    for name in sorted(every):
        having = [backend for backend in BACKENDS if name in files(backend)]
        if having != list(BACKENDS):
            explained = [f"{backend}/{name}" in ALONE for backend in having]
            assert all(explained), f"{name} is in {', '.join(having)} alone; give a reason in ALONE, or its twins"
    missing = [name for name in ALONE if not (ROOT / "backends" / name).is_file()]
    assert not missing, f"ALONE explains files that are not there: {missing}"


def test_ops_that_not_every_backend_has_are_listed():
    having = [{path.stem for path in (ROOT / "backends" / backend / "ops").glob("[a-z]*.py")} for backend in BACKENDS]
    assert set.union(*having) - set.intersection(*having) == set(OF_SOME)


# file: why one backend has public functions in it that another has not.
DIFFERENT = {
    "arrays.py": "devices, dtypes and what is set in the process are each framework's own",
    "heads/image_classification.py": "only torch captures training steps, as CUDA graphs",
    "heads/sequence_classification.py": "as heads/image_classification.py",
    "layers.py": "torch and MLX keep the bias of dt_proj in float32 by a class; flax's Embed is a head too",
    "stack.py": "what is cut and computed again is said in each framework's terms",
    "state.py": "torch must know the types of its trees",
    "weights.py": "MLX and JAX keep some weights in another layout than the canonical one",
    "mixers/bimamba.py": "torch has one operator for what is between the projections",
    "mixers/s6.py": "fused kernels of torch and one-position kernels read parameters; MLX keeps no product of dt_proj",
    "ops/__init__.py": "torch's kernels depend on a tensor's device",
    "ops/attention.py": "as ops/selective_scan.py; which keys a query sees is said in each framework's terms",
    "ops/causal_conv.py": "MLX chooses a kernel for each array, inside and outside its transformations",
    "ops/cross_entropy.py": "torch and JAX fuse the head with it",
    "ops/linear.py": "the library that multiplies is each framework's own",
    "ops/mixture_of_experts.py": "as ops/selective_scan.py",
    "ops/rms_norm.py": "torch fuses the sum before it",
    "ops/selective_scan.py": "plain forms in each framework's operations",
    "ops/ssd.py": "MLX chooses a kernel for each array, inside and outside its transformations",
}


def public(path: Path) -> list[str]:
    """The functions and classes that a file defines, in their order."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    found = (node.name for node in ast.parse(path.read_text()).body if isinstance(node, kinds))
    return [name for name in found if not name.startswith("_")]


def test_the_backends_have_the_same_public_functions():
    """In the same order; in a file of `DIFFERENT` those that all have."""
    different = set()
    for name in sorted(set.intersection(*map(files, BACKENDS))):
        functions = [public(ROOT / "backends" / backend / name) for backend in BACKENDS]
        common = set.intersection(*map(set, functions))
        if any(set(found) != common for found in functions):
            different.add(name)
        first, *rest = ([function for function in found if function in common] for found in functions)
        assert all(order == first for order in rest), f"{name}: {[first, *rest]}"
        assert name in DIFFERENT or name not in different, f"{name}: {dict(zip(BACKENDS, functions, strict=True))}"
    assert set(DIFFERENT) == different, f"DIFFERENT explains files that are alike: {set(DIFFERENT) - different}"


@pytest.mark.parametrize("name", architectures.names())
def test_every_axis_has_a_letter_that_is_documented(name):
    config = architectures.find(name).Config(d_model=64, n_layer=1, vocab_size=16)
    for parameter in parameter_table(config).values():
        assert set(parameter.axes) <= {*LETTERS, "1"}, parameter.name
        assert len(parameter.axes) == len(parameter.shape), parameter.name
    for layer, field in states.table(config):
        assert set(field.axes) <= set(LETTERS), (layer, field.name)
        assert len(field.axes) == len(field.shape), (layer, field.name)


def test_every_architecture_is_under_the_laws():
    assert set(architectures.names()) <= set(cases())
    assert {f"{name} block" for name in architectures.names()} <= set(SUBJECTS)
    whole = {f"{name} model" for name, file in cases().items() if getattr(file, "MODEL", True)}
    assert whole <= set(SUBJECTS)


# file: what it opens beside what it is given to read, which comes through `weights/formats/files.py` alone.
OPENING = {
    "weights/formats/files.py": "this is the way",
    "weights/formats/safetensors.py": "writes",
    "weights/formats/zip.py": "writes",
    "weights/formats/atomic.py": "locks and syncs what it writes",
    "mamba_core/data.py": "reads text a block at a time, of a descriptor that files.py gives",
    "mamba_core/selftest.py": "our own sources and verdicts",
    "mamba_core/vision.py": "Pillow reads bytes that files.py gave",
    "mamba_core/cli/__init__.py": "the null device, where standard output was",
    "backends/gpu/launch.py": "our own sources",
    "backends/gpu/nvrtc.py": "our own compiled kernels",
    "backends/torch/kernels/onednn_linear.py": "what the processor is",
}
OPENERS = re.compile(
    r"(?<![\w.])open\(|\bos\.open\(|\.open\(|\.read_bytes\(|\.read_text\(|\bnp\.(load|fromfile|memmap|loadtxt)\("
    r"|\bmmap\.|\bload_file\(|\bsafe_open\(|\bfrom_file\(|\bjson\.load\(|\bcopyfile\("
)


def test_what_is_read_comes_through_one_function():
    """So that no FIFO, device or endless file can be read anywhere."""
    found = {
        str(path.relative_to(ROOT))
        for path in sources("mamba_core", "backends", "weights")
        if OPENERS.search(path.read_text())
    }
    assert found == set(OPENING), f"open input by weights/formats/files.py: {found ^ set(OPENING)}"
