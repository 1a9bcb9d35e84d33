"""`noodle down`: ends the `noodle up` of this state folder, and what a killed one left; knows only its run folder."""

from __future__ import annotations

import contextlib
import os
import signal

from noodle.config.settings import CommandConfig
from noodle.errors import StartError
from services.cli.local.processes import end_leftovers, is_running, wait_for_end
from services.cli.local.run_state import acquire, run_folder_path, running

STOP_SECONDS = 75.0  # for it to stop everything in order: four ranks of at most 15 s, and a little
KILL_SECONDS = 5.0
LEFTOVER_GRACE_SECONDS = 12.0


def down(config: CommandConfig) -> int:
    """Stop it, wait until it has gone, and say what was done; 0 also when nothing ran."""
    record = running(config.state_dir)
    if record is not None:
        print(f"Stopping noodle (pid {record.supervisor.pid}).", flush=True)
        for signal_number, seconds in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, KILL_SECONDS)):
            if is_running(record.supervisor):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(record.supervisor.pid, signal_number)
            if wait_for_end(record.supervisor, seconds):
                break
        else:
            raise StartError(f"noodle (pid {record.supervisor.pid}) could not be ended.", cure="See what it waits for.")
    left = _clear(config)
    if record is not None:
        print("noodle has stopped.")
    elif left:
        print("noodle is not running; cleared what a killed one had left.")
    else:
        print("noodle is not running.")
    return 0


def _clear(config: CommandConfig) -> bool:
    """End the children and remove the folder of a `noodle up` that was killed; whether there was one."""
    if not run_folder_path(config.state_dir).exists():
        return False
    folder = acquire(config.state_dir)
    if folder is None:  # another one has started in the meantime
        return False
    record = folder.read()
    if record is not None:
        end_leftovers([each.process for each in record.services if each.process is not None], LEFTOVER_GRACE_SECONDS)
    folder.remove()
    return True
