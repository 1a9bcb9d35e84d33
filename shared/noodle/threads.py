"""Threads that a service cannot run without: when one dies, the process ends and its supervisor restarts it."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

from noodle.errors import NoodleError

log = logging.getLogger(__name__)

START_REFUSED_EXIT_CODE = 3  # gunicorn's own code for a worker that cannot boot: its master ends with it


def end_process(name: str, error: BaseException) -> NoReturn:
    """End this worker and, by its exit code, gunicorn's master; the supervisor restarts the service."""
    text = str(error) if isinstance(error, NoodleError) else f"{type(error).__name__}: {error}"
    print(f"noodle {name}: {text}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(START_REFUSED_EXIT_CODE)


def start_loop(name: str, target: Callable[[], None], service_name: str) -> None:
    """Start a thread that must not die: when it does, log why and end the process."""

    def run() -> None:
        try:
            target()
        except BaseException as error:
            # what a person can mend is told in the line that ends the process
            log.error("the %s thread died", name, exc_info=not isinstance(error, NoodleError))
            end_process(service_name, error)

    threading.Thread(target=run, name=name, daemon=True).start()
