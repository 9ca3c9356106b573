"""What is killed: a conversion or a training into a folder, and what may be found there afterwards."""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from mamba_core.weights.io import open_checkpoint
from mamba_core.weights.opening import open_model
from tests.campaign.entries import digest
from tests.campaign.inputs import TINY
from tests.campaign.kills.warm import Warm
from tests.unit import layout_files

STEPS = 5
# The files of a training that are beside the model.
OPTIMIZER_FILE, PROGRESS_FILE = "optimizer.safetensors", "training.json"
TEXT = "one sentence after the other, of which none says much. " * 8


class LostError(Exception):
    """What a kill has left is neither the old nor the new whole, or cannot be gone on with."""


def expect(holds: bool, told: str) -> None:
    if not holds:
        raise LostError(told)


def contents(folder: Path) -> tuple:
    """Everything that a checkpoint's folder says, as values that can be compared."""
    opened = open_model(folder)
    found = [("config", repr(opened.config))]
    found += [(name, digest(array)) for name, array in opened.tensors()]
    if (folder / OPTIMIZER_FILE).exists():
        state = open_checkpoint(folder / OPTIMIZER_FILE)
        found += [(name, digest(state[name])) for name in sorted(state)]
    if (folder / PROGRESS_FILE).exists():
        found.append(("progress", json.dumps(json.loads((folder / PROGRESS_FILE).read_text()), sort_keys=True)))
    names = sorted(path.name for path in folder.iterdir() if path.name != OPTIMIZER_FILE)
    return (*found, ("files", tuple(names)))


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


@dataclass
class Scenario:
    """One kind of run into `root`/out.

    argv: its command line. begin: makes of an empty `root` what is there before. whole: what may be found there by
    what it holds -> a name for it; `absent` where it may be that nothing is there.
    """

    name: str
    root: Path
    argv: list[str]
    begin: Callable[[], None]
    whole: dict[tuple, str] = field(default_factory=dict)
    absent: bool = False
    seconds: float = 0.0
    last: str = ""
    report: Path | None = None

    @property
    def out(self) -> Path:
        return self.root / "out"

    @property
    def log(self) -> Path:
        return self.root.parent / f"{self.root.name}.log"

    def reset(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
        self.root.mkdir(parents=True)
        self.begin()

    def found(self) -> str:
        """The name of what is in place: "absent", or one of `whole`."""
        if self.report is not None and self.report.exists():
            json.loads(self.report.read_text())
        if not self.out.exists():
            return "absent"
        expect(self.out.is_dir(), "out is no folder")
        try:
            held = contents(self.out)
        except Exception as fault:
            raise LostError(f"out cannot be read: {fault}") from None
        names = [path.name for path in self.out.iterdir()]
        expect(held in self.whole, f"out is neither the old one nor the new one, it has {names}")
        return self.whole[held]

    def go_on(self, server: Warm, before: str) -> str:
        """The next start: it goes on, leaves nothing beside, and ends with what an undisturbed run ends with."""
        status = server.run(self.next_argv(before), self.log)
        said = self.log.read_text(errors="replace")
        expect(status == 0, f"the next start ended with {status}: {said[-500:]}")
        found = self.found()
        expect(found == self.last, f"the next start ended with {found}, not {self.last}")
        expect(not hidden(self.root), f"the next start left {hidden(self.root)}")
        return found

    def next_argv(self, before: str) -> list[str]:
        """A conversion that is done is replaced."""
        done = self.out.exists() and "--overwrite" not in self.argv
        return [*self.argv, "--overwrite"] if done else self.argv


class Training(Scenario):
    """`train --checkpoint-every 1`, gone on with by --resume where there is a checkpoint."""

    def next_argv(self, before: str) -> list[str]:
        there = self.out.exists() or any(name.endswith(".old") for name in hidden(self.root))
        return self.resumed() if there else self.argv

    def resumed(self) -> list[str]:
        place = self.argv.index("--config")
        return [*self.argv[:place], *self.argv[place + 2 :], "--resume"]


def conversions(root: Path) -> list[Scenario]:
    """Into a new folder and over an old one, one file and shards, with a report, as safetensors and as a zip."""
    source = layout_files.write(root / "source", TINY, "mamba_ssm", seed=1)
    old = layout_files.write(root / "old", TINY, "hf", seed=2)
    made = []
    for name, options in {
        "new": [],
        "new-shards": ["--shard-size", "300"],
        "over": ["--overwrite"],
        "over-bin": ["--overwrite", "--format", "bin"],
        "over-report": ["--overwrite", "--report", "REPORT"],
    }.items():
        place = root / name
        options = [str(place / "report.json") if option == "REPORT" else option for option in options]
        argv = ["convert", str(source), str(place / "out"), "--to", "hf", "--verify", *options]
        over = "--overwrite" in options

        def begin(place=place, over=over) -> None:
            if over:
                shutil.copytree(old, place / "out")

        report = place / "report.json" if "--report" in options else None
        made.append(Scenario(f"convert {name}", place, argv, begin, absent=not over, report=report, last="new"))
    for scenario in made:
        if not scenario.absent:
            scenario.whole[contents(old)] = "old"
    return made


def trainings(root: Path, backend: str) -> list[Training]:
    """From nothing, and from the second of its checkpoints."""
    (root / "data.txt").write_text(TEXT)
    fields = {"d_model": 8, "n_layer": 1, "vocab_size": 256, "d_state": 4}
    (root / "config.json").write_text(json.dumps(fields))
    made = []
    for name in ("new", "resumed"):
        place = root / f"train-{name}"
        argv = ["train", "--data", str(root / "data.txt"), "--out", str(place / "out")]
        argv += ["--config", str(root / "config.json"), "--backend", backend, "--steps", str(STEPS), "--json"]
        argv += ["--checkpoint-every", "1", "--batch-size", "1", "--length", "8", "--warmup-steps", "2"]
        made.append(Training(f"train {name}", place, argv, lambda: None, absent=name == "new", last=str(STEPS)))
    return made


def prepare(scenario: Scenario, server: Warm, root: Path) -> None:
    """Learn from a run that is left alone what may be found, and how long it takes."""
    scenario.reset()
    snapshots = root / f"snapshots-{scenario.root.name}"
    settings = {}
    if isinstance(scenario, Training):
        shutil.rmtree(snapshots, ignore_errors=True)
        snapshots.mkdir()
        settings = {"snapshots": snapshots}
    began = time.perf_counter()
    status = server.run(scenario.argv, scenario.log, **settings)
    scenario.seconds = time.perf_counter() - began
    if status:
        said = scenario.log.read_text()[-800:]
        raise RuntimeError(f"{scenario.name} ends with {status} when it is left alone: {said}")
    if isinstance(scenario, Training):
        for path in snapshots.iterdir():
            scenario.whole[contents(path)] = path.name
        if not scenario.absent:
            scenario.begin = lambda: shutil.copytree(snapshots / "2", scenario.out)
            scenario.argv = scenario.resumed()
            scenario.resumed = lambda: scenario.argv  # type: ignore[method-assign]
    else:
        scenario.whole[contents(scenario.out)] = "new"
