"""A pytest plugin, `-p tests.meta.plugin`, that runs a suite on the broken backend that $MUTANT names."""

import os
import tempfile
from pathlib import Path

from tests.meta.mutants import use

use(os.environ["MUTANT"], Path(tempfile.mkdtemp()))
