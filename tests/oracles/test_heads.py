"""The heads against transformers', which any of its backbones takes, and against torch's losses."""

import numpy as np
import pytest

import mamba_core as mc
from mamba_core.spec import losses
from mamba_core.spec.reference import ReferenceModel
from mamba_core.spec.tolerances import relative_l2, tolerance
from mamba_core.weights.opening import open_model

torch = pytest.importorskip("torch")

IDS = np.random.default_rng(0).integers(1, 61, (3, 11)).astype(np.int32)
MASK = np.arange(11) < np.array([[11], [4], [1]])
SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "vocab_size": 61, "pad_token_id": 0}
# Backbone, head, fields of the config, targets.
THEIRS = {
    "classes": ("Mamba", "SequenceClassification", {"num_labels": 3}, np.array([0, 2, 1])),
    "several labels": (
        "Mamba",
        "SequenceClassification",
        {"num_labels": 3, "problem_type": "multi_label_classification"},
        np.array([[0, 1, 1], [1, 0, 0], [0, 0, 1]], np.float32),
    ),
    "a number": ("FalconMamba", "SequenceClassification", {"num_labels": 1}, np.array([0.5, -1, 2], np.float32)),
    "names": ("Mamba", "SequenceClassification", {"id2label": {0: "bad", 1: "good"}}, np.array([0, 1, 1])),
    "tokens": ("Mamba", "TokenClassification", {"num_labels": 4}, np.where(MASK, IDS % 4, -100)),
}


@pytest.fixture(params=THEIRS)
def theirs(request, transformers, monkeypatch):
    """Their model, and targets. Their head asks for attentions, which these backbones do not return."""
    backbone, head, fields, targets = THEIRS[request.param]
    config = getattr(transformers, f"{backbone}Config")(**SIZES, **fields)
    package = getattr(transformers.models, {"Mamba": "mamba", "FalconMamba": "falcon_mamba"}[backbone])
    module = getattr(package, f"modeling_{package.__name__.split('.')[-1]}")
    base = getattr(module, f"{backbone}PreTrainedModel")
    monkeypatch.setattr(getattr(module, f"{backbone}Output"), "attentions", None, raising=False)
    generic = getattr(transformers.modeling_layers, f"GenericFor{head}")
    torch.manual_seed(0)
    model = type(f"{backbone}For{head}", (generic, base), {"base_model_prefix": "backbone"})(config).eval()
    torch.nn.init.normal_(model.score.weight)
    return model, targets


def test_their_heads(theirs, tmp_path):
    """Logits and loss, padded on the right; read, written again, and the same on the reference."""
    model, targets = theirs
    model.save_pretrained(tmp_path / "theirs")
    given = torch.from_numpy(np.where(MASK, IDS, 0)).long()
    labels = torch.from_numpy(targets)
    labels = labels if labels.is_floating_point() else labels.long()
    with torch.no_grad():
        out = model(given, attention_mask=torch.from_numpy(MASK).long(), labels=labels)
    expected = out.logits.numpy()
    opened = open_model(tmp_path / "theirs")
    reference = ReferenceModel(opened.config, dict(opened.tensors()))
    logits = reference(IDS, mask=MASK).logits
    counts = MASK if logits.ndim == 3 else slice(None)
    assert relative_l2(logits[counts], expected[counts]) <= tolerance("float32")
    loss, _ = reference.task.loss(opened.config, logits, targets, MASK)
    assert loss == pytest.approx(out.loss.item(), rel=1e-5)
    mc.save(mc.load(tmp_path / "theirs", backend="torch"), tmp_path / "ours")
    assert open_model(tmp_path / "ours").config == opened.config
    again = type(model).from_pretrained(tmp_path / "ours").eval()
    assert again.config.id2label == model.config.id2label
    with torch.no_grad():
        found = again(given, attention_mask=torch.from_numpy(MASK).long()).logits.numpy()
    np.testing.assert_array_equal(found[counts], expected[counts])


def test_the_losses_are_torch_s():
    rng = np.random.default_rng(1)
    logits, weights = rng.normal(size=(5, 4)), [0.5, 2.0, 0.0, 1.0]
    given = torch.from_numpy(logits).requires_grad_()
    classes, labels = rng.integers(0, 4, 5), rng.integers(0, 2, (5, 4)).astype(float)
    counts = np.array([True, False, True, True, True])
    kept, weighing = torch.from_numpy(counts), torch.tensor(weights, dtype=torch.float64)
    functional = torch.nn.functional
    quantiles = [0.1, 0.5, 0.9]
    below = torch.from_numpy(labels[counts][:, :3, None]) - given[kept][:, :3, None].expand(-1, -1, 3)
    pairs = [
        (
            losses.cross_entropy(logits, classes, counts, weights),
            functional.cross_entropy(given[kept], torch.from_numpy(classes[counts]), weighing),
        ),
        (
            losses.binary_cross_entropy(logits, labels, counts, weights),
            functional.binary_cross_entropy_with_logits(given[kept], torch.from_numpy(labels[counts]), weighing)
            * 16
            / (4 * sum(weights)),
        ),
        (
            losses.squared_error(logits, labels, np.repeat(counts[:, None], 4, 1)),
            functional.mse_loss(given[kept], torch.from_numpy(labels[counts])),
        ),
    ]
    for (loss, gradient), expected in pairs:
        assert loss == pytest.approx(expected.item(), rel=1e-12)
        (wanted,) = torch.autograd.grad(expected, given)
        np.testing.assert_allclose(gradient, wanted.numpy(), atol=1e-14)
    levels = torch.tensor(quantiles, dtype=torch.float64)
    expected = torch.maximum(levels * below, (levels - 1) * below).mean()
    loss, gradient = losses.pinball(
        np.repeat(logits[:, :3, None], 3, 2), labels[:, :3], np.repeat(counts[:, None], 3, 1), quantiles
    )
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    (wanted,) = torch.autograd.grad(expected, given)
    np.testing.assert_allclose(gradient.sum(-1), wanted.numpy()[:, :3], atol=1e-14)
