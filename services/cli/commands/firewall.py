"""`noodle firewall`: shows, sets or takes away who may come to the ports that this machine publishes.

Knows files, programs and rights; what the rules say is in firewall_rules.py.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from noodle.errors import ConfigurationError, NoodleError, StartError
from services.cli.project import firewall_rules
from services.cli.project.firewall_rules import CHAIN, DOCKER_CHAIN, Opening
from services.cli.project.programs import Ran, System, run_program
from services.cli.project.project import Project

Act = Literal["show", "apply", "undo"]
SCRIPT_PATH = Path("/usr/local/sbin/noodle-firewall")
UNIT_NAME = "noodle-firewall.service"
UNIT_PATH = Path("/etc/systemd/system") / UNIT_NAME
RULES_SECONDS = 15.0  # of one program that changes rules
POWERSHELL_SECONDS = 120.0  # its firewall commands take seconds each
DOCKER_SECONDS = 10.0
OWN_NETWORK = "{{range .IPAM.Config}}{{.Subnet}} {{end}}"


def firewall(project: Project, system: System, clients: Sequence[str], act: Act) -> int:
    """Print what is to be; with apply or undo also do it."""
    if system == "other":
        raise ConfigurationError("`noodle firewall` knows Linux and Windows.")
    if act == "undo":
        _undo(system)
        return 0
    openings = firewall_rules.openings_of(project, clients, own_networks(project) if system == "linux" else ())
    print(f"Ports that {project.machine} ({project.lan_address}) publishes:")
    print("\n".join(firewall_rules.in_words(openings)))
    print("Whoever is not named is turned away. No other port is touched; ssh is not.")
    if system == "windows":
        print(f"Docker Desktop's own rule ({firewall_rules.DOCKER_RULE}) is narrowed to the same addresses,")
        print("which holds for the ports of other containers on this machine too.")
    script = _script(project, system, openings)
    if act == "show":
        print(f"\n{script}\nNothing was changed. `noodle firewall --apply` does this.")
        return 0
    _apply(system, script)
    return 0


def own_networks(project: Project) -> list[str]:
    """The networks of this machine's own containers, which reach one another also by published ports."""
    name = project.values.get("COMPOSE_PROJECT_NAME") or "noodle"
    ran = run_program(["docker", "network", "inspect", f"{name}_default", "--format", OWN_NETWORK], DOCKER_SECONDS)
    return [text for text in ran.output.split() if ":" not in text] if ran.is_good else []  # none until the first `up`


def _script(project: Project, system: System, openings: Sequence[Opening]) -> str:
    if system == "windows":
        return firewall_rules.windows_script(openings)
    return firewall_rules.linux_script(openings, project.lan_address)


def _apply(system: System, script: str) -> None:
    if system == "windows":
        _must(_powershell(script), "The rules could not be set")
        print("\nDone. Windows keeps the rules over a restart.")
        return
    _need_root()
    _need_docker_chain()
    try:
        SCRIPT_PATH.write_text(script, encoding="ascii")
        SCRIPT_PATH.chmod(0o755)
    except OSError as error:
        raise StartError(f"{SCRIPT_PATH} can not be written ({error.strerror}).", cure="Make room there.") from error
    _must(run_program([str(SCRIPT_PATH)], RULES_SECONDS), "The rules could not be set")
    print(f"\nDone: the rules stand in {CHAIN}, which {DOCKER_CHAIN} calls first.")
    if not _has_systemd():
        print(f"There is no systemd here: run {SCRIPT_PATH} after each boot, when Docker has started.")
        return
    UNIT_PATH.write_text(firewall_rules.systemd_unit(str(SCRIPT_PATH)), encoding="ascii")
    for command in (["daemon-reload"], ["enable", "--quiet", UNIT_NAME]):
        _must(run_program(["systemctl", *command], RULES_SECONDS), "The rules would not be set at the next boot")
    print(f"{UNIT_NAME} sets them again at each boot.")


def _undo(system: System) -> None:
    if system == "windows":
        _must(_powershell(firewall_rules.windows_undo()), "The rules could not be taken away")
        print("noodle's rules are gone, and Docker Desktop's own is as it came.")
        return
    _need_root()
    if _has_systemd() and UNIT_PATH.exists():
        _must(run_program(["systemctl", "disable", "--quiet", UNIT_NAME], RULES_SECONDS), "The unit stays")
        UNIT_PATH.unlink()
        _must(run_program(["systemctl", "daemon-reload"], RULES_SECONDS), "The unit stays")
    with contextlib.suppress(FileNotFoundError):  # it was never applied, or undone before
        SCRIPT_PATH.unlink()
    for command in firewall_rules.linux_undo():
        run_program(command, RULES_SECONDS)  # fails where there is no such rule, which is what is wanted
    if run_program(["iptables", "-w", "5", "-S", CHAIN], RULES_SECONDS).is_good:
        raise StartError(f"The chain {CHAIN} is still there.", cure=f"sudo iptables -S | grep {CHAIN}")
    print("noodle's rules are gone: its ports are open to everyone on the network again.")


def _need_root() -> None:
    if hasattr(os, "geteuid") and os.geteuid() != 0:
        raise StartError("Only root may change firewall rules.", cure="sudo deploy/firewall.sh --apply (or --undo)")
    if shutil.which("iptables-restore") is None:
        raise StartError("There is no iptables here.", cure="sudo apt-get install -y iptables")


def _need_docker_chain() -> None:
    ran = run_program(["iptables", "-w", "5", "-S", DOCKER_CHAIN], RULES_SECONDS)
    if not ran.is_good:
        raise StartError(
            f"Docker has made no chain {DOCKER_CHAIN}: {ran.said}",
            cure="Start Docker first: sudo systemctl start docker",
        )


def _has_systemd() -> bool:
    return Path("/run/systemd/system").is_dir()


def _powershell(script: str) -> Ran:
    return run_program(["powershell", "-NoProfile", "-NonInteractive", "-Command", script], POWERSHELL_SECONDS)


def _must(ran: Ran, what: str) -> None:
    if not ran.is_good:
        late = " in time" if ran.is_late else ""
        raise NoodleError(f"{what}{late}: {ran.said}", cure="Run it as root (Linux) or as administrator (Windows).")
