"""A card for tests: ggml's RPC device, served by a separate process.

Its memory is not this process's, as with a card; its operations are those of ggml's CPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from services.stage.executors.ggml.backend import folder_of_libraries, load_ggml
from tests.support.processes.cluster import free_ports
from tests.support.stages.executors import need_ggml

START_SECONDS = 30.0
LIBRARY = "libggml-rpc.so"
SERVE = """
import ctypes, sys
from services.stage.executors.ggml.backend import folder_of_libraries, load_ggml
ggml = load_ggml().module
rpc = ctypes.CDLL(str(folder_of_libraries() / "libggml-rpc.so"))
device = ggml.ggml_backend_dev_by_name(b"CPU")
devices = (ctypes.c_void_p * 1)(ctypes.cast(device, ctypes.c_void_p))
rpc.ggml_backend_rpc_start_server(sys.argv[1].encode(), None, ctypes.c_size_t(1), ctypes.c_size_t(1), devices)
"""


@contextlib.contextmanager
def a_card() -> Iterator[str]:
    """Run the card's process and return ggml's name of the card; skip if ggml lacks RPC, fail in CI."""
    need_ggml()
    path = folder_of_libraries() / LIBRARY
    if not path.is_file():
        if os.environ.get("CI"):
            pytest.fail(f"{LIBRARY} is needed in CI")
        pytest.skip(f"this ggml was built without {LIBRARY}")
    (port,) = free_ports(1)
    endpoint = f"127.0.0.1:{port}"
    process = subprocess.Popen([sys.executable, "-c", SERVE, endpoint], stdout=subprocess.DEVNULL)
    try:
        yield added(endpoint, process)
    finally:
        process.kill()
        process.wait()


def added(endpoint: str, process: subprocess.Popen[bytes]) -> str:
    """Register the card with ggml in this process; return its name."""
    ggml = load_ggml().module
    rpc = ctypes.CDLL(str(folder_of_libraries() / LIBRARY))
    rpc.ggml_backend_rpc_add_server.restype = ctypes.c_void_p
    end = time.monotonic() + START_SECONDS
    while not (registry := rpc.ggml_backend_rpc_add_server(endpoint.encode())):
        assert process.poll() is None, "the card's process ended"
        assert time.monotonic() < end, f"no card in {START_SECONDS:.0f} seconds"
        time.sleep(0.1)  # polling interval
    before = set(load_ggml().devices)
    ggml.ggml_backend_register(registry)
    (name,) = set(load_ggml().devices) - before
    return name
