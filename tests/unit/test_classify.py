"""Image files to classes: what is cut out, labels, and one line for what is no image."""

import io
import json

import numpy as np
import pytest

import mamba_core as mc
from mamba_core.cli import main
from mamba_core.registry import installed
from mamba_core.vision import DEVIATION, MEAN, read_image
from mamba_core.weights.formats import CheckpointError

Image = pytest.importorskip("PIL.Image")
CONFIG = mc.VisionMambaConfig(d_model=8, n_layer=1, task_options={"image_size": 32, "patch_size": 8, "num_classes": 6})


@pytest.fixture(scope="module")
def backend_name():
    return installed()[0]


@pytest.fixture
def checkpoint(tmp_path, backend_name):
    """Its names of classes beside it, as transformers' configs have them."""
    mc.save(mc.build(CONFIG, backend=backend_name), tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    names = {"id2label": {str(number): f"class {number}" for number in range(6)}}
    path.write_text(json.dumps(json.loads(path.read_text()) | names))
    return tmp_path / "model"


def picture(path, rows, columns, seed=0, **settings):
    value = np.random.default_rng(seed).integers(0, 256, (rows, columns, 3)).astype(np.uint8)
    Image.fromarray(value).save(path, **settings)
    return path


def test_the_likeliest_classes_are_the_models(tmp_path, checkpoint, backend_name):
    paths = [picture(tmp_path / "a.png", 40, 50), picture(tmp_path / "b.png", 33, 32, seed=1)]
    found = mc.classify_images(paths, checkpoint, top=6, backend=backend_name)
    model = mc.load(checkpoint, backend=backend_name)
    from mamba_core import registry

    backend = registry.get(backend_name)
    for path, guesses in zip(paths, found, strict=True):
        image = read_image(path, (32, 32))[None]
        logits = backend.to_numpy(model(backend.from_numpy(image, device=model.device)).logits)[0]
        wanted = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        assert [guess.label for guess in guesses] == [f"class {index}" for index in np.argsort(-logits)]
        np.testing.assert_allclose([guess.probability for guess in guesses], np.sort(wanted)[::-1], rtol=1e-5)
    ((first, second),) = mc.classify_images(paths[0], model, top=2)
    assert [first.label, second.label] == [guess.label for guess in found[0][:2]]
    assert first.probability == pytest.approx(found[0][0].probability, rel=1e-5)


def test_an_image_as_large_as_the_scaled_one_is_cut_and_normalised(tmp_path):
    """36 is 32 / 0.875 without its fraction, so that nothing is scaled."""
    path = picture(tmp_path / "a.png", 36, 48)
    pixels = np.asarray(Image.open(path), np.float32)[2:34, 8:40] / 255
    wanted = ((pixels - np.float32(MEAN)) / np.float32(DEVIATION)).transpose(2, 0, 1)
    np.testing.assert_allclose(read_image(path, (32, 32)), wanted, atol=1e-6)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_other_kinds_of_colours(tmp_path, mode):
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.new(mode, (70, 40)).save(path)
    assert read_image(path, (32, 48)).shape == (3, 32, 48)


def test_a_turned_photograph_is_upright(tmp_path):
    """Whose file says so in its EXIF tags."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned to the right
    picture(tmp_path / "a.png", 36, 36, exif=exif)
    picture(tmp_path / "b.png", 36, 36)
    turned, plain = (read_image(tmp_path / name, (32, 32)) for name in ("a.png", "b.png"))
    np.testing.assert_array_equal(turned, np.rot90(plain, -1, axes=(1, 2)))


def test_what_is_no_image_is_one_line(tmp_path, checkpoint, monkeypatch):
    data = picture(tmp_path / "a.png", 40, 40).read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.png").write_bytes(b"no image")
    (tmp_path / "empty.png").write_bytes(b"")
    for name, kind, message in (
        ("cut.png", ValueError, "cut.png: no image that Pillow reads: "),
        ("text.png", ValueError, "text.png: no image that Pillow reads: its format is not known"),
        ("empty.png", CheckpointError, "empty.png: the file is empty"),
        (".", CheckpointError, "is a folder"),
        ("none.png", FileNotFoundError, "none.png"),
    ):
        with pytest.raises(kind, match=message) as fault:
            mc.classify_images(tmp_path / name, checkpoint)
        assert "\n" not in str(fault.value)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"a\.png: the image has more pixels than Pillow takes"):
        mc.classify_images(tmp_path / "a.png", checkpoint)


def test_other_models_and_settings_are_refused(tmp_path, checkpoint, backend_name):
    path = picture(tmp_path / "a.png", 40, 40)
    for top in (0, 7, True, 2.0):
        with pytest.raises(ValueError, match="expected an integer from 1 to 6"):
            mc.classify_images(path, checkpoint, top=top)
    tokens = mc.build(mc.MambaConfig(d_model=8, n_layer=1, vocab_size=5), backend=backend_name)
    with pytest.raises(ValueError, match="task 'lm'; classifying images needs one of task 'image_classification'"):
        mc.classify_images(path, tokens)
    with pytest.raises(TypeError, match="dtype given with a model"):
        mc.classify_images(path, tokens, dtype="float32")
    gray = mc.VisionMambaConfig(d_model=8, n_layer=1, task_options={"channels": 1})
    with pytest.raises(ValueError, match="the model's images have 1 channels"):
        mc.classify_images(path, mc.build(gray, backend=backend_name))


def test_the_command(tmp_path, checkpoint, backend_name, capsys):
    path = str(picture(tmp_path / "a.png", 40, 40))
    arguments = ["classify", path, "--checkpoint", str(checkpoint), "--top", "3", "--backend", backend_name]
    assert main([*arguments, "--json"]) == 0
    (told,) = json.load(io.StringIO(capsys.readouterr().out))
    wanted = mc.classify_images(path, checkpoint, top=3, backend=backend_name)[0]
    assert told == {"image": path, "classes": [guess._asdict() for guess in wanted]}
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert all(f"{guess.probability:.1%}" in shown and guess.label in shown for guess in wanted)
    assert main(["classify", str(tmp_path / "none.png"), "--checkpoint", str(checkpoint)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
