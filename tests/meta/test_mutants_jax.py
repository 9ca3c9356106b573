"""The conformance suite rejects every broken JAX backend, and each by the property that is meant to; with --slow."""

import pytest

from tests.meta import broken
from tests.meta.mutants_jax import CAUGHT_BY

pytest.importorskip("jax")
# JAX compiles every shape that a law draws.
pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("law", "name"), [(law, name) for law, mutants in CAUGHT_BY.items() for name in mutants])
def test_the_suite_rejects(law, name):
    broken.assert_rejected(broken.run("jax", "mutants_jax", name, law), law)
