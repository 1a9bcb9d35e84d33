"""Two machines on one engine: two projects with a core, a network and an address each, removed at the end."""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Iterator
from pathlib import Path

from tests.engine.engine import docker, run
from tests.engine.project import Project
from tests.support.processes.cluster import request

FIRST_CUT = "15,15"  # of 30 layers; a measured cut would differ from run to run


class Pair:
    """Machines A and B: each is its own project with its own address on this host."""

    def __init__(self, folder: Path, networks: list[str]) -> None:
        self.networks = networks
        self.address_a, self.address_b = (_gateway(network) for network in networks)
        for name in ("a", "b"):
            (folder / name).mkdir()
        self.a = Project(folder / "a", core=0, NOODLE_SPLIT=FIRST_CUT)
        self.b = Project(folder / "b", core=1)

    def init(self) -> None:
        """Run A's init, then B's with the line that A printed."""
        printed = self.a.init("--machine", "a", "--address", self.address_a, "--peer", self.address_b)
        join = printed.rsplit("--join ", 1)[1].split()[0]
        self.b.init("--machine", "b", "--join", join)

    @property
    def stage_1_port(self) -> int:
        """Return the port on which B publishes its stage."""
        return self.b.ports["STAGE_1"]

    def cut_power(self) -> None:
        """Kill both machines, as a power failure does."""
        self.a.compose("kill")
        self.b.compose("kill")

    def layers(self) -> list[list[int]]:
        """Return [start, end) of each stage from the coordinator's /health."""
        return [stage["layers"] for stage in self.a.health()["stages"]]

    def tensor_bytes(self, start: int, end: int) -> int:
        """Return the bytes of the tensors for these layers, from the coordinator's manifest."""
        _, manifest = request(self.a.port, "GET", "/weights", token=self.a.token)
        tensors = {tensor["name"]: tensor["byte_count"] for tensor in manifest["tensors"]}
        layers = {f"blk.{layer}." for layer in range(start, end)}
        last = max(int(name.split(".")[1]) for name in tensors if name.startswith("blk."))
        names = {name for name in tensors if any(name.startswith(prefix) for prefix in layers)}
        if start == 0:
            names.add("token_embd.weight")
        if end == last + 1:  # the head is tied to the embedding
            names |= {"output_norm.weight", "token_embd.weight"}
        return sum(tensors[name] for name in names)


def _gateway(network: str) -> str:
    return json.loads(docker("network", "inspect", network))[0]["IPAM"]["Config"][0]["Gateway"]


@contextlib.contextmanager
def two_machines(folder: Path) -> Iterator[Pair]:
    """Make a pair with its .env and secrets; nothing is started yet."""
    networks: list[str] = []
    pair = None
    try:
        for name in ("a", "b"):  # gives two addresses on this host
            networks.append(f"noodle-test-lan-{name}-{secrets.token_hex(4)}")
            docker("network", "create", networks[-1])
        pair = Pair(folder, networks)
        pair.init()
        yield pair
    finally:
        if pair is not None:
            pair.a.down()
            pair.b.down()
        for network in networks:
            run(["docker", "network", "rm", network])
    assert pair.a.left_behind() == pair.b.left_behind() == []
