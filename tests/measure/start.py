"""From nothing to the first token, and a second start to ready, with what each waits for."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from tests.measure.report import Section
from tests.support.cluster import Cluster
from tests.support.real_model import real_model_folder

ROOT = Path(__file__).parents[2]


def measure() -> Section:
    """A fresh clone through `make run` (packages, model, measurement, layers), then `noodle up` once more."""
    section = Section("start", "From nothing to the first token")
    section.say(
        "A clone in an empty folder with an empty cache of models and measurements; pip's own cache is as this "
        "machine has it. `make run` until the first token of a request, then `noodle up` again until ready."
    )
    with tempfile.TemporaryDirectory() as scratch:
        clone = Path(scratch) / "noodle"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        cluster = Cluster(Path(scratch) / "state", "SmolLM2-135M-Instruct", 2)
        cluster.environment |= {"NOODLE_CACHE_DIR": str(Path(scratch) / "cache")}
        cluster.environment.pop("VIRTUAL_ENV", None)
        started = time.monotonic()
        with (Path(scratch) / "make.log").open("wb") as log:
            cluster.process = subprocess.Popen(
                ["make", "run"], cwd=clone, env=cluster.environment, stdout=log, stderr=log, start_new_session=True
            )
        cluster.output_path = Path(scratch) / "make.log"
        marks = watch(cluster, clone, started)
        cluster.generate("The capital of France is", max_new_tokens=1)
        marks.append(("first token", time.monotonic() - started))
        subprocess.run([clone / ".venv/bin/noodle", "down"], env=cluster.environment, check=True, capture_output=True)
        cluster.process.wait(60)
        rows = [[what, f"{at:.1f}"] for what, at in marks]
        section.table(["fresh clone: `make run`", "seconds since its start"], rows)
        sizes = [(clone / ".venv", "`.venv`"), (Path(scratch) / "cache", "the cache of models and measurements")]
        section.say(" and ".join(f"{what} takes {disk_bytes(path) / 1e9:.1f} GB" for path, what in sizes) + ".")
        section.say()
        shutil.rmtree(clone)
    with tempfile.TemporaryDirectory() as scratch:
        cluster = Cluster(Path(scratch) / "state", real_model_folder(), 2)
        started = time.monotonic()
        cluster.start()
        seconds = time.monotonic() - started
        log_text = (Path(scratch) / "state" / "run" / "logs" / "stage-0.log").read_text(encoding="utf-8")
        cluster.stop()
    section.say(f"A second `noodle up` (model converted, machine measured) until ready: **{seconds:.1f} s**.")
    section.say()
    section.say("What stage 0 did meanwhile, by its log:")
    section.say()
    for line in log_text.splitlines():
        if re.match(r"\d\d:\d\d:\d\d ", line):
            section.say(f"    {line[:100]}")
    return section


def disk_bytes(folder: Path) -> int:
    """What a folder takes on disk."""
    done = subprocess.run(["du", "-sk", folder], check=True, capture_output=True, text=True)
    return int(done.stdout.split()[0]) * 1024


def watch(cluster: Cluster, clone: Path, started: float) -> list[tuple[str, float]]:
    """When the packages, the model's files and the whole cluster were there."""
    marks: list[tuple[str, float]] = []
    signs = {
        "packages installed": lambda: (clone / ".venv/bin/noodle").exists(),
        "model downloaded and converted": lambda: "planner" in services(cluster),
        "ready (stages started, measured and loaded)": lambda: ready(cluster),
    }
    for what, sign in signs.items():
        while not sign():
            assert cluster.process.poll() is None, cluster.output_path.read_text(encoding="utf-8")
            time.sleep(0.1)  # the resolution of this measurement
        marks.append((what, time.monotonic() - started))
    return marks


def services(cluster: Cluster) -> set[str]:
    """Names of the services that run by now."""
    path = cluster.state_dir / "run" / "run.json"
    try:
        return {service["name"] for service in json.loads(path.read_bytes())["services"]}
    except (OSError, ValueError, KeyError):
        return set()


def ready(cluster: Cluster) -> bool:
    """Whether the coordinator says so."""
    try:
        return bool(cluster.get("/health")[1].get("status") == "ready")
    except OSError:
        return False
