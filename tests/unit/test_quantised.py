"""mlx-lm's quantised checkpoints: the values that they stand for, in bounded memory, or one clear error."""

import dataclasses
import json
import tracemalloc

import ml_dtypes
import numpy as np
import pytest

import mamba_core as mc
from mamba_core.weights.formats import CheckpointError, sources_of, write_safetensors_file
from mamba_core.weights.io import open_checkpoint
from mamba_core.weights.opening import open_model
from mamba_core.weights.quantised import BITS, dequantised, unpacked

from .layout_files import CONFIG, arrays_of, write

WIDE = dataclasses.replace(CONFIG, d_model=32, vocab_size=16, d_state=8, dt_rank=16)
ADVICE = "dequantise it first: mlx_lm.convert --hf-path PATH --mlx-path NEW --dequantize"


def packed(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Whole numbers (rows, columns) as words: the bits of a row one after the other, the lowest first."""
    flat = (numbers[..., None] >> np.arange(bits)) & 1
    return np.packbits(flat.astype(np.uint8).reshape(len(numbers), -1), -1, bitorder="little").view("<u4")


def quantise(arrays, bits, group=32, dtype=np.float32, seed=0):
    """The tensors with every weight of two axes and enough columns quantised, and the values that they stand for."""
    rng = np.random.default_rng(seed)
    stored, values = {}, {}
    for name, array in arrays.items():
        stored[name] = values[name] = array
        if not name.endswith(".weight") or array.ndim != 2 or array.shape[1] % group:
            continue
        rows, columns = array.shape
        numbers = rng.integers(0, 2**bits, (rows, columns))
        scales, biases = rng.normal(size=(2, rows, columns // group)).astype(dtype)
        path = name.removesuffix(".weight")
        stored |= {name: packed(numbers, bits), f"{path}.scales": scales, f"{path}.biases": biases}
        apart = numbers.astype(dtype).reshape(rows, -1, group) * scales[..., None] + biases[..., None]
        values[name] = apart.reshape(rows, columns)
    return stored, values


def write_quantised(folder, bits, dtype=np.float32, group=32, tied=False, **settings):
    """A checkpoint of mlx-lm with quantised weights, and the values of its tensors."""
    config = dataclasses.replace(WIDE, tie_embeddings=tied)
    arrays = arrays_of(write(folder, config, "mlx_lm"))
    stored, values = quantise(arrays, bits, group, dtype)
    write_safetensors_file(folder / "model.safetensors", sources_of(stored), metadata={"format": "mlx"})
    fields = json.loads((folder / "config.json").read_text())
    quantization = {"group_size": group, "bits": bits} | settings
    fields |= {"quantization": quantization, "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(fields))
    return folder, values


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_the_values_of_every_width(tmp_path, bits, dtype):
    folder, values = write_quantised(tmp_path / "a", bits, dtype)
    opened = open_model(folder)
    assert opened.layout == "mlx_lm"
    assert opened.config == WIDE
    assert not {"quantization", "quantization_config"} & set(opened.config.extra)
    assert set(opened.checkpoint) == set(values)
    for name, value in values.items():
        assert opened.checkpoint.header(name) == (value.shape, value.dtype.name, value.nbytes)
        assert opened.checkpoint[name].tobytes() == value.tobytes(), name
    assert sum(name.endswith("in_proj.weight") for name in values) == 2


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_mlx_dequantises_to_the_same_bits(tmp_path, bits, dtype, group):
    mx = pytest.importorskip("mlx.core")
    weight = mx.random.normal((5, 256), key=mx.random.key(bits)).astype(getattr(mx, dtype))
    parts = dict(zip(("weight", "scales", "biases"), mx.quantize(weight, group, bits), strict=True))
    mx.save_safetensors(str(tmp_path / "a.safetensors"), {f"w.{name}": part for name, part in parts.items()})
    fields = {"quantization": {"group_size": group, "bits": bits}}
    _, opened = dequantised(tmp_path, fields, open_checkpoint(tmp_path / "a.safetensors"))
    expected = mx.dequantize(*parts.values(), group, bits)
    assert opened.header("w.weight").dtype == dtype
    assert opened["w.weight"].astype(np.float32).tobytes() == np.array(expected.astype(mx.float32)).tobytes()


@pytest.mark.parametrize("bits", BITS)
def test_numbers_are_packed_one_after_the_other(bits):
    numbers = np.random.default_rng(0).integers(0, 2**bits, (3, 64))
    assert np.array_equal(unpacked(packed(numbers, bits), bits), numbers)


def test_a_layer_may_have_a_width_of_its_own(tmp_path):
    folder, values = write_quantised(tmp_path / "a", 4)
    name = "backbone.layers.1.mixer.in_proj"
    stored, own = quantise({f"{name}.weight": values[f"{name}.weight"]}, 8, 16)
    arrays = arrays_of(folder) | stored
    write_safetensors_file(folder / "model.safetensors", sources_of(arrays), metadata={"format": "mlx"})
    fields = json.loads((folder / "config.json").read_text())
    fields["quantization"] |= {name: {"group_size": 16, "bits": 8}, "lm_head": False, "backbone.embeddings": True}
    (folder / "config.json").write_text(json.dumps(fields))
    found = open_model(folder).checkpoint
    assert found[f"{name}.weight"].tobytes() == own[f"{name}.weight"].tobytes()
    other = "backbone.layers.0.mixer.in_proj.weight"
    assert found[other].tobytes() == values[other].tobytes()


def test_a_quantised_checkpoint_is_converted(tmp_path):
    folder, values = write_quantised(tmp_path / "a", 4, tied=True)
    mc.convert(folder, tmp_path / "b", to="hf")
    fields = json.loads((tmp_path / "b" / "config.json").read_text())
    assert "quantization" not in str(fields)
    name = "backbone.layers.0.mixer.x_proj.weight"
    assert open_checkpoint(tmp_path / "b")[name].tobytes() == values[name].tobytes()


def test_a_head_that_is_quantised_as_its_embedding_is_tied(tmp_path):
    folder, _ = write_quantised(tmp_path / "a", 4, tied=True)
    arrays = arrays_of(folder)
    for end in ("weight", "scales", "biases"):
        arrays[f"lm_head.{end}"] = arrays[f"backbone.embeddings.{end}"].copy()
    write_safetensors_file(folder / "model.safetensors", sources_of(arrays), metadata={"format": "mlx"})
    assert open_model(folder).config.tie_embeddings
    arrays["lm_head.biases"][0, 0] += 1
    write_safetensors_file(folder / "model.safetensors", sources_of(arrays), metadata={"format": "mlx"})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from backbone\.embeddings\.weight"):
        open_model(folder)


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    """Beside the result there are some rows."""
    stored, _ = quantise({f"{name}.weight": np.zeros((4096, 512), np.float32) for name in "abc"}, 4)
    write_safetensors_file(tmp_path / "a.safetensors", sources_of(stored))
    fields = {"quantization": {"group_size": 32, "bits": 4}}
    _, opened = dequantised(tmp_path, fields, open_checkpoint(tmp_path / "a.safetensors"))
    tracemalloc.start()
    for name in opened:
        assert opened[name].nbytes == 2**23
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5 * 2**23


def change(folder, tensors=None, **settings):
    arrays = arrays_of(folder)
    for name, value in (tensors or {}).items():
        arrays[name] = value
        if value is None:
            del arrays[name]
    write_safetensors_file(folder / "model.safetensors", sources_of(arrays), metadata={"format": "mlx"})
    fields = json.loads((folder / "config.json").read_text())
    fields["quantization"] |= settings
    (folder / "config.json").write_text(json.dumps(fields))


LAYER = "backbone.layers.0.mixer.in_proj"


@pytest.mark.parametrize(
    ("tensors", "settings", "words"),
    [
        ({}, {"mode": "mxfp4"}, f"quantised in mode 'mxfp4'; this version reads 'affine' only; {ADVICE}"),
        ({}, {"bits": 7}, f"quantised in 7 bits; expected one of 2, 3, 4, 5, 6, 8; {ADVICE}"),
        ({}, {"bits": True}, "quantised in True bits"),
        ({}, {"bits": [4]}, r"quantised in \[4\] bits"),
        ({}, {"bits": 8}, r"has words \(16, 4\) and scales \(16, 1\), which are not 8 bits in groups of 32"),
        ({}, {"group_size": 64}, "which are not 4 bits in groups of 64"),
        ({}, {"group_size": -32}, "in groups of -32; expected a positive integer"),
        ({}, {"group_size": 2**70}, "which are not 4 bits in groups of"),
        ({f"{LAYER}.biases": None}, {}, f"{LAYER} is quantised without biases.*{ADVICE}"),
        ({f"{LAYER}.biases": np.zeros((128, 2), np.float32)}, {}, "has scales and biases float32"),
        ({f"{LAYER}.scales": np.zeros((128, 1), np.int8)}, {}, "has scales and biases int8"),
        (
            {f"{LAYER}.scales": np.zeros((), np.float32), f"{LAYER}.biases": np.zeros((), np.float32)},
            {},
            "which are not",
        ),
        ({f"{LAYER}.weight": np.zeros((128, 3), np.uint32)}, {}, r"has words \(128, 3\)"),
    ],
)
def test_faults_of_what_is_quantised(tmp_path, tensors, settings, words):
    folder, _ = write_quantised(tmp_path / "a", 4)
    change(folder, tensors, **settings)
    with pytest.raises(CheckpointError, match=words) as caught:
        open_model(folder)
    assert str(caught.value).startswith(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fields", [None, {}, {"quantization": 4}])
def test_a_quantised_file_without_its_settings(tmp_path, fields):
    folder, _ = write_quantised(tmp_path / "a", 4)
    with pytest.raises(
        CheckpointError, match=r"has quantised tensors, such as '.*', but its config\.json has no quant"
    ):
        dequantised(folder, fields, open_checkpoint(folder))
