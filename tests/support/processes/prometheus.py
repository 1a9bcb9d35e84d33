"""A real Prometheus on loopback with the committed grafana/prometheus.yml, and queries to it.

The program is the one on PATH, or the one of Debian's package, unpacked into a folder of the cache.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes.cluster import free_ports, wait_until

GRAFANA = Path(__file__).parents[3] / "grafana"
RATE_INTERVAL = "$__rate_interval"
READY_SECONDS = 30.0
STOP_SECONDS = 30.0
PACKAGE_SECONDS = 240.0
ANSWER_SECONDS = 10.0
# Present on some machines only: a GPU, a container with a limit.
NOT_EVERYWHERE = ("noodle_gpu_", "noodle_container_")


def without_data_here(expression: str) -> bool:
    """Return whether a query may be empty on a machine without a GPU and outside a container."""
    return any(prefix in expression for prefix in NOT_EVERYWHERE)


def programs() -> tuple[Path, Path]:
    """Return prometheus and promtool; skip the test if they are unavailable, fail in CI."""
    found = [shutil.which(name) for name in ("prometheus", "promtool")]
    if all(found):
        return Path(str(found[0])), Path(str(found[1]))
    folder = Path(os.environ.get("NOODLE_CACHE_DIR") or Path.home() / ".cache" / "noodle") / "test-tools" / "prometheus"
    unpacked = folder / "usr/bin/prometheus", folder / "usr/bin/promtool"
    if not all(program.is_file() for program in unpacked):
        try:
            _unpack_package(folder)
        except (OSError, subprocess.SubprocessError) as error:
            said = getattr(error, "stderr", None) or error
            message = f"no prometheus on PATH, and Debian's package is unavailable: {said}"
            if os.environ.get("CI"):
                pytest.fail(message)
            pytest.skip(message)
    return unpacked


def _unpack_package(folder: Path) -> None:
    """Unpack Debian's package without installing it; its program needs only the C library."""
    work = folder.with_name("prometheus.download")
    shutil.rmtree(work, ignore_errors=True)
    (work / "lists" / "partial").mkdir(parents=True)
    (work / "unpacked").mkdir()
    run = {"cwd": work, "check": True, "capture_output": True, "text": True, "timeout": PACKAGE_SECONDS}
    try:
        subprocess.run(["apt-get", "download", "prometheus"], **run)
    except subprocess.CalledProcessError:  # this machine has no package lists, or old ones: use separate lists
        own = ("-o", f"Dir::State::Lists={work / 'lists'}", "-o", f"Dir::Cache={work}", "-o", "APT::Sandbox::User=")
        subprocess.run(["apt-get", *own, "update"], **run)
        subprocess.run(["apt-get", *own, "download", "prometheus"], **run)
    (package,) = work.glob("prometheus_*.deb")
    subprocess.run(["dpkg-deb", "-x", str(package), str(work / "unpacked")], **run)
    shutil.rmtree(folder, ignore_errors=True)
    (work / "unpacked").replace(folder)
    shutil.rmtree(work)


def configuration(coordinator_address: str, token_path: Path) -> str:
    """Return the committed prometheus.yml with another address and token file."""
    text = (GRAFANA / "prometheus.yml").read_text(encoding="utf-8")
    for committed, here in (("coordinator:8080", coordinator_address), ("/run/secrets/cluster_token", str(token_path))):
        assert committed in text
        text = text.replace(committed, here)
    return text


class Prometheus:
    """A running Prometheus."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the samples of an instant query; fail with the error of Prometheus if it refuses the query."""
        answer = self._get("/api/v1/query", query=expression)
        assert answer["status"] == "success", f"{expression}: {answer.get('error')}"
        return list(answer["data"]["result"])

    def targets(self) -> list[dict[str, Any]]:
        """Return the active targets."""
        return list(self._get("/api/v1/targets")["data"]["activeTargets"])

    def is_ready(self) -> bool:
        """Return whether it answers queries."""
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=ANSWER_SECONDS) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def _get(self, path: str, **fields: str) -> dict[str, Any]:
        try:
            url = f"{self.url}{path}?{urllib.parse.urlencode(fields)}"
            with urllib.request.urlopen(url, timeout=ANSWER_SECONDS) as answer:
                return dict(json.load(answer))
        except urllib.error.HTTPError as error:
            return dict(json.load(error))


@contextlib.contextmanager
def running_prometheus(folder: Path, configuration_text: str) -> Iterator[Prometheus]:
    """Run a Prometheus that is ready; stop it at the end."""
    prometheus, _ = programs()
    folder.mkdir()
    (folder / "prometheus.yml").write_text(configuration_text, encoding="utf-8")
    (port,) = free_ports(1)
    arguments = [
        str(prometheus),
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=warn",
    ]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(arguments, stdout=log, stderr=log)
    running = Prometheus(port)
    try:
        wait_until(lambda: running.is_ready() or process.poll() is not None, READY_SECONDS, "Prometheus is ready")
        assert process.poll() is None, (folder / "log").read_text(encoding="utf-8")
        yield running
    finally:
        process.terminate()
        process.wait(STOP_SECONDS)
