"""A pytest plugin, `-p tests.meta.plugin`, that runs a suite on a broken backend.

$MUTANT names the mutant, $MUTANTS the module that holds it, "mutants" (PyTorch's) if not set.
"""

import importlib
import os
import tempfile
from pathlib import Path

mutants = importlib.import_module(f"tests.meta.{os.environ.get('MUTANTS', 'mutants')}")
mutants.use(os.environ["MUTANT"], Path(tempfile.mkdtemp()))
