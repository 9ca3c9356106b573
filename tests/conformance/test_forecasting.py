"""Forecasts on every backend: missing values, scales, rollouts, and gradients in a series, against the reference."""

import dataclasses

import numpy as np
import pytest

import mamba_core as mc
from mamba_core.spec.init import initial_values
from mamba_core.spec.reference import ReferenceModel

from . import models
from .assertions import assert_close, assert_zero

BATCH, LENGTH = 3, 8
OPTIONS = {"channels": 2, "horizon": 3, "covariates": 1, "instance_norm": True, "quantiles": [0.25, 0.5, 0.9]}
CONFIG = mc.MambaConfig(d_model=12, n_layer=1, d_state=3, task="forecasting", task_options=OPTIONS)
PLAIN = dataclasses.replace(CONFIG, task_options={"channels": 2, "horizon": 2})
RNG = np.random.default_rng(0)
SERIES = (5.0 + 3.0 * RNG.standard_normal((BATCH, LENGTH, 2))).astype(np.float32)
COVARIATES = RNG.standard_normal((BATCH, LENGTH, 1)).astype(np.float32)
FUTURE = RNG.standard_normal((BATCH, 6, 1)).astype(np.float32)
MASK = np.array([[1] * 8, [0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0, 0]], bool)
OBSERVED = RNG.random((BATCH, LENGTH, 2)) < 0.7


def reference(config):
    return ReferenceModel(config, dict(initial_values(config, 1)))


@models.by_backend
def built(backend, config):
    return mc.build(config, backend=backend.name, seed=1)


def rolled_out(config, series, steps, stride, future, **positions):
    """A rollout written out: the whole series again and what was forecast behind it, on the scale of its beginning."""
    model, known = reference(config), series.shape[1]
    pieces, scales = [], None
    for done in range(0, steps, stride):
        given = {} if scales is None else {"location": scales.location, "scale": scales.scale}
        out = model(series, **given, **positions)
        scales = out if scales is None else scales
        pieces.append(out.forecast[:, :stride])
        fed = out.forecast[:, :stride, :, 1] if out.forecast.ndim == 4 else out.forecast[:, :stride]
        series = np.concatenate([series, np.concatenate([fed, future[:, done : done + stride]], -1)], 1)
        for name, value in positions.items():
            more = np.ones((BATCH, stride, *value.shape[2:]), bool)
            positions[name] = np.concatenate([value, more], 1)
    assert series.shape[1] >= known + steps
    return np.concatenate(pieces, 1)[:, :steps]


@pytest.mark.parametrize("stride", [1, 3])
def test_a_rollout_goes_on_from_its_own_forecast(backend, stride):
    """As if the whole series had been read again each time: with padding on both sides, and with missing values."""
    positions = {"mask": MASK, "observed": OBSERVED}
    series = np.concatenate([SERIES, COVARIATES], -1)
    expected = rolled_out(CONFIG, series, 5, stride, FUTURE, **positions)
    given = {"covariates": COVARIATES, "future_covariates": FUTURE, **positions}
    found = mc.forecast(built(backend, CONFIG), SERIES, 5, stride=stride, **given)
    assert found.shape == (BATCH, 5, 2, 3)
    # What is fed back is forecast one by one; the last forecast is whole.
    whole = 5 if stride == 3 else 3
    assert_close(found[:, :whole], expected[:, :whole], "float32", "value", "the rollout")


def test_a_rollout_without_scales_and_covariates(backend):
    found = mc.forecast(built(backend, PLAIN), SERIES, 5)
    assert_close(found, rolled_out(PLAIN, SERIES, 6, 2, np.zeros((BATCH, 6, 0)))[:, :5], "float32", "value", "rollout")


def test_the_direct_forecast_is_the_model_s(backend):
    model = built(backend, CONFIG)
    given = {"observed": OBSERVED, "mask": MASK}
    wanted = reference(CONFIG)(np.concatenate([SERIES, COVARIATES], -1), **given).forecast
    found = mc.forecast(model, SERIES, covariates=COVARIATES, **given)
    assert_close(found, wanted, "float32", "value", "the forecast")
    np.testing.assert_array_equal(mc.forecast(model, SERIES, 2, covariates=COVARIATES, **given), found[:, :2])


def test_missing_values_may_be_anything(backend):
    """Also not a number; which is how `forecast` is told of them too. They get no gradient."""
    model, marked = built(backend, CONFIG), np.where(OBSERVED, SERIES, np.nan)
    wanted = mc.forecast(model, SERIES, covariates=COVARIATES, observed=OBSERVED)
    np.testing.assert_array_equal(mc.forecast(model, marked, covariates=COVARIATES), wanted)
    series = np.concatenate([marked, COVARIATES], -1)
    given = {
        name: backend.from_numpy(value, device=model.device) for name, value in (("observed", OBSERVED), ("mask", MASK))
    }
    cotangent = np.random.default_rng(2).standard_normal(wanted.shape).astype(np.float32)
    native = [backend.from_numpy(value, device=model.device) for value in (series, cotangent)]
    _, (found,) = backend.vjp(lambda value: (model(value, **given).forecast,), native[:1], native[1:])
    gradients, _ = reference(CONFIG).vjp(cotangent, series, observed=OBSERVED, mask=MASK)
    assert_close(found, gradients["values"], "float32", "gradient", "gradient in the series")
    assert_zero(found[..., :2][~(OBSERVED & MASK[..., None])], "the gradient of what is missing")


def test_the_forecast_has_the_series_scale(backend):
    """A series moved and stretched has its forecast moved and stretched."""
    config = dataclasses.replace(CONFIG, task_options=OPTIONS | {"covariates": 0})
    model = built(backend, config)
    found, other = mc.forecast(model, SERIES), mc.forecast(model, 100 * SERIES - 1000)
    np.testing.assert_allclose(other, 100 * found - 1000, rtol=1e-3)


def test_what_cannot_be_forecast_is_refused(backend):
    model, series = built(backend, CONFIG), SERIES
    known, two = {"covariates": COVARIATES}, {"future_covariates": FUTURE[:, :2]}
    wrong = [
        ("covariates are missing", {}, {}),
        (r"future_covariates are missing; expected \(b, 3, 1\)", known, {"steps": 4}),
        (r"future_covariates has shape \(3, 2, 1\); expected \(3, at least 3, 1\)", known | two, {"steps": 5}),
        ("steps is 0; expected an integer from 1", known, {"steps": 0}),
        ("stride is 4; expected an integer from 1 to 3", known, {"stride": 4}),
        ("row 1 has no position that counts", known | {"mask": MASK & [[True], [False], [True]]}, {}),
        (r"observed has shape \(3, 8, 1\); expected", known | {"observed": OBSERVED[..., :1]}, {}),
    ]  # fmt: skip
    for message, arrays, settings in wrong:
        with pytest.raises(ValueError, match=message):
            mc.forecast(model, series, **arrays, **settings)
    with pytest.raises(ValueError, match=r"values is float32 of shape \(3, 8, 1\); expected numbers \(b, l, 2\)"):
        mc.forecast(model, series[..., :1], **known)
    with pytest.raises(ValueError, match="not finite where they count"):
        mc.forecast(model, series * np.nan, observed=OBSERVED, **known)
    native = backend.from_numpy(np.concatenate([series, COVARIATES], -1))
    with pytest.raises(ValueError, match="a state is given, but neither location nor scale"):
        model(native, model.init_state(BATCH))
    with pytest.raises(ValueError, match="location given; expected both or neither"):
        model(native, location=backend.from_numpy(np.zeros((3, 2), np.float32)))
    with pytest.raises(TypeError, match="expected values; none given"):
        model()
    skewed = built(backend, dataclasses.replace(CONFIG, task_options={"quantiles": [0.1, 0.9]}))
    with pytest.raises(ValueError, match=r"expected 0\.5 among them"):
        mc.forecast(skewed, series[..., :1], 2)
    classes = built(backend, dataclasses.replace(CONFIG, vocab_size=8, task="lm", task_options={}))
    with pytest.raises(ValueError, match="task 'lm', without a forecast; a forecast needs one of task 'forecasting'"):
        mc.forecast(classes, series)
