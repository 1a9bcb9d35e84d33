"""The Docker engine of these tests: detection, base images and commands."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
IMAGES = Path(__file__).with_name("images")
BASE_IMAGES = ("python:3.11-slim-bookworm", "valkey/valkey:9", "prom/prometheus:v3.5.0")
CONTROL, STAGE = "noodle-test-control", "noodle-test-stage"
WITH_TRANSFORMERS = "noodle-test-stage-transformers"
COMMAND_SECONDS = 120.0
PULL_SECONDS = 300.0
BASE_SECONDS = 600.0
BUILD_SECONDS = 1200.0


def run(arguments: Sequence[str], seconds: float = COMMAND_SECONDS, **options: object) -> subprocess.CompletedProcess:
    """Run a command to its end with its output as text; fail if it takes longer."""
    return subprocess.run(list(arguments), capture_output=True, text=True, timeout=seconds, check=False, **options)  # type: ignore[call-overload]


def docker(*arguments: str, seconds: float = COMMAND_SECONDS, environment: Mapping[str, str] | None = None) -> str:
    """Return the standard output of a docker command; fail if it fails."""
    done = run(["docker", *arguments], seconds, env=environment)
    assert done.returncode == 0, f"docker {' '.join(arguments)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return str(done.stdout)


@functools.cache
def missing_engine() -> str:
    """Return why no engine can be used, or an empty text."""
    if shutil.which("docker") is None:
        return "there is no docker command"
    info = run(["docker", "info", "--format", "{{.ServerVersion}}"])
    return "" if info.returncode == 0 else f"docker info: {info.stderr.strip()[-300:]}"


def require_engine() -> None:
    """Skip the test without an engine; fail in CI."""
    if not (reason := missing_engine()):
        return
    if os.environ.get("CI"):
        pytest.fail(f"These tests need a Docker engine in CI: {reason}")
    pytest.skip(f"no Docker engine: {reason}")


def require_base_images() -> None:
    """Provide the base images: present already, from a registry, or made by base_images.sh."""
    missing = [image for image in BASE_IMAGES if run(["docker", "image", "inspect", image]).returncode]
    missing = [image for image in missing if run(["docker", "pull", "--quiet", image], PULL_SECONDS).returncode]
    has_plugins = all(run(["docker", plugin, "version"]).returncode == 0 for plugin in ("compose", "buildx"))
    if missing or not has_plugins:
        done = run([str(IMAGES / "base_images.sh"), *missing], BASE_SECONDS)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def build(dockerfile: str, target: str, tag: str, **arguments: str) -> None:
    """Build one image of this project; the engine's build cache is kept between runs."""
    given = [part for name, value in arguments.items() for part in ("--build-arg", f"{name}={value}")]
    command = ["build", "--file", str(ROOT / dockerfile), "--target", target, "--tag", tag, *given, str(ROOT)]
    docker(*command, seconds=BUILD_SECONDS, environment={**os.environ, "DOCKER_BUILDKIT": "1"})


def in_image(image: str, *command: str, options: Sequence[str] = ()) -> subprocess.CompletedProcess:
    """Run a command in a new container and remove it."""
    return run(["docker", "run", "--rm", "--network", "none", *options, image, *command])
