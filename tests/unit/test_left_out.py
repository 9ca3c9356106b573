"""An installation without the CPU kernels says so once, when a model is built that would use them."""

import pytest

import mamba_core as mc
from mamba_core.backends.native import library
from mamba_core.registry import installed

CONFIG = mc.MambaConfig(d_model=8, n_layer=1, vocab_size=16)


@pytest.fixture
def left_out(monkeypatch):
    monkeypatch.delenv("MAMBA_CORE_NATIVE", raising=False)
    monkeypatch.setattr(library, "missing", lambda: "not built; with a C++ compiler, install it again")
    library.warn_if_left_out.cache_clear()
    yield monkeypatch
    library.warn_if_left_out.cache_clear()


def build(**settings):
    return mc.build(CONFIG, backend=installed()[0], device="cpu", **settings)


def test_it_is_said_once(left_out, recwarn):
    for _ in range(2):
        build()
    (warned,) = recwarn.list
    assert str(warned.message).endswith(
        "so models on a CPU run more slowly: not built; with a C++ compiler, install it again"
    )
    assert warned.filename == __file__


def test_it_is_said_of_a_checkpoint(left_out, tmp_path):
    mc.save(build(kernels="plain"), tmp_path / "model")
    with pytest.warns(UserWarning, match="the CPU kernels in C\\+\\+ are left out"):
        mc.load(tmp_path / "model", backend=installed()[0], device="cpu")


def test_who_chose_so_is_not_told(left_out, recwarn):
    build(kernels="plain")
    left_out.setenv("MAMBA_CORE_NATIVE", "0")
    build()
    assert not recwarn.list


def test_nothing_is_said_where_they_are(recwarn):
    library.warn_if_left_out.cache_clear()
    if library.missing() is not None:
        pytest.skip("this installation has none")
    build()
    assert not recwarn.list
