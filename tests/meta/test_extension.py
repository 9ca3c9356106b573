"""An architecture is added by adding files: one that lives in another package, with a part of every kind.

`tests/meta/toy` holds blocks of three kinds, one of them Mamba-1's, a feed-forward, an op, a state of rank 4, a state
that grows, mixers for each backend, a table of weights and a case file. The tests install it in a temporary folder as
pip would.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOY = Path(__file__).parent / "toy"

USE = """
import json, os, sys
from pathlib import Path

os.environ["MAMBA_CORE_BACKEND"] = sys.argv[1]
import numpy as np

import mamba_core as mc
from mamba_core import registry, selftest

name, folder = sys.argv[1], Path(sys.argv[2])
backend = registry.get(name)
config = mc.ToyConfig(d_model=8, n_layer=5, vocab_size=23, d_state=4, pattern="mshmm", tie_embeddings=False)
assert mc.PRESETS["toy-tiny"].architecture == "toy"
model = mc.build(config, backend=name, device="cpu", seed=3)

# Trained a little, so that its text is not one token.
data = np.random.default_rng(0).integers(0, 23, 4000)
history = mc.train(model, data, mc.TrainSettings(steps=3, batch_size=2, length=12))
assert all(np.isfinite(entry["loss"]) for entry in history), history

# Saved, loaded, converted, compared with the reference: whole, in chunks, in steps, and its gradients.
mc.save(model, folder / "saved")
again = mc.load(folder / "saved", backend=name, device="cpu")
assert again.config == config, again.config
mc.convert(folder / "saved", folder / "converted", to="hf", verify=True)
report = mc.parity(folder / "converted", backends=[name], length=21, steps=9, grad=True)
assert report.passed, report.to_dict()

# Its op is tried by the self-tests because it is there; JAX would compile each trial.
verdict = selftest.examine(backend, "leaky_sum", "plain", "cpu") if name != "jax" else selftest.Verdict(trials=6)
assert (verdict.faults, verdict.trials) == ((), 6), verdict

# Generated beyond every capacity: in one call, in chunks of the prompt, and from a state that went through a file.
prompts = [[1, 2, 3, 4, 5, 6, 7], [8, 9]]
whole = mc.generate(again, prompts, max_new_tokens=45)
chunked = mc.generate(again, prompts, max_new_tokens=45, prefill_chunk=3)
assert whole.tokens == chunked.tokens, (whole.tokens, chunked.tokens)
first = mc.generate(again, prompts, max_new_tokens=20, return_state=True)
mc.save_state(first.state, folder / "state.safetensors", again)
state = mc.load_state(folder / "state.safetensors", again)
second = mc.generate(again, [[row[20]] for row in whole.tokens], max_new_tokens=24, state=state)
assert [row[21:] for row in whole.tokens] == second.tokens
print(json.dumps({"tokens": whole.tokens, "explained": str(mc.explain(again))}))
"""

REFUSED = """
import numpy as np
import mamba_core as mc
from mamba_core import registry

model = mc.build("toy-tiny", backend="torch", device="cpu")
ids = registry.get("torch").from_numpy(np.zeros((1, 4), np.int64), device="cpu")
try:
    model(ids, segment_ids=ids)
except ValueError as fault:
    print(fault)
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """The environment of a process that finds the toy."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(TOY, folder / "toy_package", ignore=shutil.ignore_patterns("__pycache__"))
    metadata = folder / "toy-0.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 0.1\n")
    (metadata / "entry_points.txt").write_text("[mamba_core.extensions]\ntoy = toy_package\n")
    return os.environ | {"PYTHONPATH": str(folder)}


def run(environment, *command, **settings):
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, **settings
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_it_is_used_as_ours_are(backend, environment, tmp_path):
    found = json.loads(run(environment, "-c", USE, backend.name, tmp_path).splitlines()[-1])
    if backend.name in ("torch", "jax"):  # which have a native step, for the runs of Mamba-1's blocks
        assert "layer 0: native_step" in found["explained"]
        assert "layers 3 to 4: native_step" in found["explained"]
        assert "layer 1: plain" in found["explained"]


def test_it_is_under_every_law(backend, environment):
    # JAX compiles every shape that is drawn, and what else it would compile here, the use above has compiled.
    few, files = environment | {"EXAMPLES": "4"}, ["tests/conformance"]
    if backend.name == "jax":
        few, files = few | {"EXAMPLES": "2"}, [f"tests/conformance/test_{name}.py" for name in ("laws", "model")]
    printed = run(few, "-m", "pytest", *files, "--backend", backend.name, "-vv", "-k", "toy or leaky", "-x")
    passed = set(re.findall(r"test_laws\.py::test_(\w+)\[(.*)-\w+\] PASSED", printed))
    laws = {"the_whole", "split_with_the_carried_state", "steps", "each_row_alone", "causal"}
    subjects = {"leaky_sum", "toy block", "toy model"}
    # The toy's model does not pack; its op does.
    assert passed == {(law, subject) for law in laws for subject in subjects} | {
        ("packed_sequences_apart", "leaky_sum")
    }
    assert len(re.findall(r"test_model\.py.*toy.* PASSED", printed)) >= 40


def test_what_it_cannot_do_is_refused(environment):
    pytest.importorskip("torch")
    assert "toy cannot separate packed sequences; give no segment_ids" in run(environment, "-c", REFUSED)


def test_without_its_package_there_is_no_such_config():
    import mamba_core as mc

    with pytest.raises(AttributeError, match="ToyConfig"):
        mc.ToyConfig  # noqa: B018
