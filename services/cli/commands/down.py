"""`noodle down`: stops the `noodle up` of this state folder, and cleans up after one that was killed."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal

from noodle.config.environment import command_config, process_environment
from noodle.config.settings import CommandConfig
from noodle.errors import StartError
from services.cli.client.run_record import ProcessIdentity, is_running, read_record, run_folder_path, running
from services.cli.local.processes import end_leftovers, wait_until
from services.cli.local.run_folder import acquire

STOP_SECONDS = 75.0  # for `noodle up` to stop its services: four ranks of at most 15 s, and some spare
KILL_SECONDS = 5.0  # from SIGKILL until the kernel has ended it


def down(_options: argparse.Namespace) -> int:
    """Stop it, wait until it has ended, and print what was done; 0 also if nothing ran."""
    config = command_config(process_environment())
    record = running(config.state_dir)
    if record is not None:
        print(f"Stopping noodle (pid {record.supervisor.pid}).", flush=True)
        _end(record.supervisor)
    was_killed = _clean_up(config)
    if record is not None:
        print("noodle has stopped.")
    elif was_killed:
        print("noodle is not running; cleaned up after one that was killed.")
    else:
        print("noodle is not running.")
    return 0


def _end(supervisor: ProcessIdentity) -> None:
    for signal_number, seconds in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, KILL_SECONDS)):
        if is_running(supervisor):
            with contextlib.suppress(ProcessLookupError):
                os.kill(supervisor.pid, signal_number)
        if wait_until(lambda: not is_running(supervisor), seconds):
            return
    raise StartError(
        f"noodle (pid {supervisor.pid}) could not be ended.", cure=f"See what it waits for: ps -fp {supervisor.pid}"
    )


def _clean_up(config: CommandConfig) -> bool:
    """End the children and remove the folder of a `noodle up` that was killed; return whether there was one."""
    if not run_folder_path(config.state_dir).exists():
        return False
    folder = acquire(config.state_dir)
    if folder is None:  # another one has started in the meantime
        return False
    record = read_record(folder.path)
    if record is not None:
        end_leftovers(record)
    folder.remove()
    return True
