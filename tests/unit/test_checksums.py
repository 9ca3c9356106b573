"""The checksums of zip files: one flipped bit of a tensor is one clear error, wherever the tensor is read."""

import numpy as np
import pytest

import mamba_core as mc
from mamba_core.registry import installed
from mamba_core.weights.formats import CheckpointError
from mamba_core.weights.io import open_checkpoint

CONFIG = mc.MambaConfig(d_model=8, n_layer=1, vocab_size=24)
LAYOUTS = {"mambapy": "model.pt", "mambapy-mlx": "weights.npz", "mamba_ssm": "pytorch_model.bin"}


@pytest.fixture(params=LAYOUTS)
def damaged(request, tmp_path):
    """A folder in which a bit of in_proj is flipped."""
    folder = tmp_path / "model"
    mc.save(mc.build(CONFIG, backend=installed()[0]), folder, layout=request.param)
    file = folder / LAYOUTS[request.param]
    opened = open_checkpoint(file)
    name = next(name for name in opened if name.endswith("in_proj.weight"))
    data, wanted = bytearray(file.read_bytes()), opened[name].tobytes()
    data[data.index(wanted) + len(wanted) // 2] ^= 1
    file.write_bytes(data)
    return folder


def test_a_flipped_bit_is_found(damaged, tmp_path):
    uses = (
        lambda: mc.load(damaged, backend=installed()[0]),
        lambda: mc.convert(damaged, tmp_path / "out", to="hf"),
        lambda: mc.convert(damaged, tmp_path / "out", to="hf", verify=True),
    )
    for use in uses:
        with pytest.raises(
            CheckpointError, match=r"in_proj.weight': \S+: record '.*' is damaged: its checksum does not fit"
        ) as caught:
            use()
        assert str(caught.value).count(str(damaged)) == 1
    assert not (tmp_path / "out").exists()


def test_other_tensors_are_read(damaged):
    (file,) = (damaged / name for name in LAYOUTS.values() if (damaged / name).is_file())
    opened = open_checkpoint(file)
    for name in opened:
        if not name.endswith("in_proj.weight"):
            assert np.isfinite(np.asarray(opened[name], np.float32)).all()


def test_a_file_without_checksums_is_read(tmp_path):
    torch = pytest.importorskip("torch")
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"weight": torch.arange(5.0)}, tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    assert open_checkpoint(tmp_path / "a.pt")["weight"].tolist() == [0, 1, 2, 3, 4]
