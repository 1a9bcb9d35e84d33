"""`noodle firewall`: shows, sets or removes the firewall rules for the ports that this machine publishes."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
from pathlib import Path

from noodle.errors import ConfigurationError, NoodleError, StartError
from services.cli.project import firewall as rules
from services.cli.project.firewall import CHAIN, DOCKER_CHAIN, SCRIPT_PATH, UNIT_NAME, UNIT_PATH
from services.cli.project.programs import Ran, System, run_program, this_system
from services.cli.project.project import require_project

RULES_SECONDS = 15.0  # one program that changes rules
POWERSHELL_SECONDS = 120.0  # one script; each of its firewall commands takes seconds


def firewall(options: argparse.Namespace) -> int:
    """Print the rules; with --apply set them, with --undo remove them."""
    project, system = require_project(Path.cwd()), this_system()
    if options.undo and options.clients:
        raise ConfigurationError("--clients is for setting rules, and --undo sets none.", cure="Leave one of them out.")
    if system == "other":
        raise ConfigurationError("`noodle firewall` works on Linux and Windows only.")
    if options.undo:
        _undo(system)
        return 0
    openings = rules.openings_of(project, options.clients, rules.own_networks(project) if system == "linux" else ())
    print(f"Ports that {project.machine} ({project.lan_address}) publishes:")
    print("\n".join(rules.in_words(openings)))
    print("All other addresses are refused. No other port is affected, ssh included.")
    if system == "windows":
        print(f"Docker Desktop's own rule ({rules.DOCKER_RULE}) is narrowed to the same addresses, which also")
        print("affects the ports of other containers on this machine.")
        script = rules.windows_script(openings)
    else:
        script = rules.linux_script(openings, project.lan_address)
    if options.apply:
        _apply(system, script)
    else:
        print(f"\n{script}\nNothing was changed. `noodle firewall --apply` sets these rules.")
    return 0


def _apply(system: System, script: str) -> None:
    if system == "windows":
        _must(_powershell(script), "The rules could not be set")
        print("\nDone. Windows keeps the rules after a restart.")
        return
    _require_root()
    ran = run_program(["iptables", "-w", "5", "-S", DOCKER_CHAIN], RULES_SECONDS)
    if not ran.is_good:
        raise StartError(
            f"Docker has made no chain {DOCKER_CHAIN}: {ran.last_line}",
            cure="Start Docker first: sudo systemctl start docker",
        )
    try:
        SCRIPT_PATH.write_text(script, encoding="ascii")
        SCRIPT_PATH.chmod(0o755)
    except OSError as error:
        raise StartError(
            f"{SCRIPT_PATH} cannot be written ({error.strerror}).", cure="Free some space on that disk."
        ) from error
    _must(run_program([str(SCRIPT_PATH)], RULES_SECONDS), "The rules could not be set")
    print(f"\nDone: the rules are in {CHAIN}, which {DOCKER_CHAIN} calls first.")
    if not _has_systemd():
        print(f"This machine has no systemd: run {SCRIPT_PATH} after each boot, when Docker has started.")
        return
    UNIT_PATH.write_text(rules.systemd_unit(str(SCRIPT_PATH)), encoding="ascii")
    for command in (["daemon-reload"], ["enable", "--quiet", UNIT_NAME]):
        _must(run_program(["systemctl", *command], RULES_SECONDS), "The rules would not be set at the next boot")
    print(f"{UNIT_NAME} sets them again at each boot.")


def _undo(system: System) -> None:
    if system == "windows":
        _must(_powershell(rules.windows_undo()), "The rules could not be removed")
        print("noodle's rules are removed, and Docker Desktop's own is reset.")
        return
    _require_root()
    if _has_systemd() and UNIT_PATH.exists():
        _must(run_program(["systemctl", "disable", "--quiet", UNIT_NAME], RULES_SECONDS), "The unit stays")
        UNIT_PATH.unlink()
        _must(run_program(["systemctl", "daemon-reload"], RULES_SECONDS), "The unit stays")
    with contextlib.suppress(FileNotFoundError):  # never applied, or removed before
        SCRIPT_PATH.unlink()
    for change in (["-D", DOCKER_CHAIN, "-j", CHAIN], ["-F", CHAIN], ["-X", CHAIN]):
        # fails if there is no such rule, which is the goal
        run_program(["iptables", "-w", "5", *change], RULES_SECONDS)
    if run_program(["iptables", "-w", "5", "-S", CHAIN], RULES_SECONDS).is_good:
        raise StartError(f"The chain {CHAIN} is still there.", cure=f"sudo iptables -S | grep {CHAIN}")
    print("noodle's rules are removed: its ports are open to everyone on the network again.")


def _require_root() -> None:
    if hasattr(os, "geteuid") and os.geteuid() != 0:
        raise StartError("Only root may change firewall rules.", cure="sudo deploy/firewall.sh --apply (or --undo)")
    if shutil.which("iptables-restore") is None:
        raise StartError("iptables is not installed.", cure="sudo apt-get install -y iptables")


def _has_systemd() -> bool:
    return Path("/run/systemd/system").is_dir()


def _powershell(script: str) -> Ran:
    return run_program(["powershell", "-NoProfile", "-NonInteractive", "-Command", script], POWERSHELL_SECONDS)


def _must(ran: Ran, what: str) -> None:
    if not ran.is_good:
        late = " in time" if ran.is_late else ""
        raise NoodleError(
            f"{what}{late}: {ran.last_line}", cure="Run it as root (Linux) or as administrator (Windows)."
        )
