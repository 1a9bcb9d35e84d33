"""The firewall: whether the published ports are closed to strangers and open to the other machine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct

from noodle.errors import NoodleError
from services.cli.doctor.results import CheckResult, ok, skipped, warning
from services.cli.project import firewall as rules
from services.cli.project.firewall import CHAIN, DOCKER_CHAIN, SCRIPT_PATH
from services.cli.project.programs import Run, System
from services.cli.project.project import Project

RULES_SECONDS = 5.0  # one question to iptables
POWERSHELL_SECONDS = 15.0  # one question to PowerShell
UFW_PATH = Path("/etc/ufw/ufw.conf")
APPLY = {
    "linux": "sudo deploy/firewall.sh --apply",
    "windows": "deploy\\firewall.ps1 -Apply   (as administrator)",
    "other": "close the ports with this system's firewall",
}
AS_ROOT = "sudo bash -c 'source deploy/command.sh; noodle doctor'"
WHY = "anyone on the network can try them; each one has a lock, but a closed port needs none"
LOOPBACK_ONLY = "its ports are on 127.0.0.1 only"
ASK_WINDOWS = (
    "@{profiles=@(Get-NetFirewallProfile | Where-Object Enabled -eq 'True' | ForEach-Object Name); "
    "networks=@(Get-NetConnectionProfile | ForEach-Object { [string]$_.NetworkCategory }); "
    f"rules=@(Get-NetFirewallRule -Group '{rules.WINDOWS_GROUP}' -ErrorAction SilentlyContinue | "
    "ForEach-Object DisplayName); "
    f"docker=@(Get-NetFirewallRule -DisplayName '{rules.DOCKER_RULE}' -ErrorAction SilentlyContinue | "
    "Get-NetFirewallAddressFilter | ForEach-Object { [string]$_.RemoteAddress })} | ConvertTo-Json -Compress"
)


class FirewallFacts(Struct, frozen=True, kw_only=True):
    """What is known about the firewall; None could not be read."""

    expected_script: str = ""  # empty: nothing to close
    nothing_to_close: str = ""
    script: str | None = None  # written by `noodle firewall --apply`
    rules: tuple[str, ...] | None = None  # of noodle's chain, as iptables prints them
    is_called: bool = False  # by DOCKER-USER
    unread: str = ""  # why the rules could not be read
    is_ufw_active: bool = False
    windows: dict[str, list[str]] | None = None


def gather_firewall(run: Run, system: System, project: Project | None) -> FirewallFacts:
    """Read as much as this user may."""
    if project is None:
        return FirewallFacts()
    if project.role == "single":
        return FirewallFacts(nothing_to_close=LOOPBACK_ONLY)
    try:
        openings = rules.openings_of(project, (), rules.own_networks(project) if system == "linux" else ())
        expected = rules.linux_script(openings, project.lan_address)
    except NoodleError as error:
        return FirewallFacts(nothing_to_close=error.message)
    if system == "windows":
        ran = run(["powershell", "-NoProfile", "-NonInteractive", "-Command", ASK_WINDOWS], POWERSHELL_SECONDS)
        windows = _lists(ran.output) if ran.is_good else None
        return FirewallFacts(expected_script=expected, windows=windows, unread=ran.last_line)
    try:
        script = SCRIPT_PATH.read_text(encoding="utf-8")
    except OSError:  # never applied
        script = None
    docker = run(["iptables", "-w", "2", "-S", DOCKER_CHAIN], RULES_SECONDS)
    own = run(["iptables", "-w", "2", "-S", CHAIN], RULES_SECONDS)
    found: tuple[str, ...] | None = None
    unread = ""
    if docker.is_good:
        found = tuple(line for line in own.output.splitlines() if line.startswith("-A")) if own.is_good else ()
    else:
        unread = "iptables is not installed" if docker.is_missing else docker.last_line
    return FirewallFacts(
        expected_script=expected,
        script=script,
        rules=found,
        is_called=f"-j {CHAIN}" in docker.output,
        unread=unread,
        is_ufw_active=_is_ufw_active(),
    )


def check_firewall(facts: FirewallFacts, where: str, system: System) -> list[CheckResult]:
    """Judge the firewall; open ports are only a warning, because each one has a lock."""
    if not facts.expected_script and not facts.nothing_to_close:
        return [skipped("firewall", where, "there is no .env that publishes a port to the network")]
    if facts.nothing_to_close:
        return [ok("firewall", where, facts.nothing_to_close)]
    if system == "windows":
        return _check_windows(facts, where)
    results = []
    if facts.is_ufw_active:
        results.append(ok("firewall", where, "ufw is on, but does not cover ports that Docker publishes"))
    if facts.rules is not None:
        results.append(_check_rules(facts, facts.rules, where, system))
    elif facts.script is None:
        what = "The published ports are open to the whole network (`noodle firewall` was not applied)."
        results.append(warning("firewall", where, what, why=WHY, cure=APPLY[system]))
    else:
        reason = f"{SCRIPT_PATH} sets rules at each boot, but only root may read whether they are set now"
        results.append(skipped("firewall", where, f"{reason} ({facts.unread}): {AS_ROOT}"))
    return results


def _check_rules(facts: FirewallFacts, found: Sequence[str], where: str, system: System) -> CheckResult:
    if not found or not facts.is_called:
        what = "The published ports are open to the whole network: no rule closes them."
        return warning("firewall", where, what, why=WHY, cure=APPLY[system])
    missing = sorted(ports_in(facts.expected_script.splitlines()) - ports_in(found))
    if missing:
        what = f"Rules are set, but not for the ports {', '.join(map(str, missing))} of .env."
        return warning("firewall", where, what, why=WHY, cure=APPLY[system])
    return ok("firewall", where, f"the ports {', '.join(map(str, sorted(ports_in(found))))} are closed to strangers")


def ports_in(rules: Sequence[str]) -> set[int]:
    """Return the ports that are closed to all but the named addresses."""
    found = set()
    for rule in rules:
        words = rule.split()
        if words[:1] == ["-A"] and words[-1] == "DROP" and "--ctorigdstport" in words:
            found.add(int(words[words.index("--ctorigdstport") + 1]))
    return found


def _check_windows(facts: FirewallFacts, where: str) -> list[CheckResult]:
    if facts.windows is None:
        return [skipped("firewall", where, f"PowerShell did not answer ({facts.unread})")]
    results = []
    if "Public" in facts.windows["networks"]:
        why = "its firewall then drops what the other machine sends"
        cure = "Get-NetConnectionProfile | Set-NetConnectionProfile -NetworkCategory Private   (administrator)"
        results.append(warning("firewall", where, "Windows treats this network as public.", why=why, cure=cure))
    if not facts.windows["profiles"]:
        what = "The Windows firewall is off: the published ports are open to the whole network."
        cure = "Set-NetFirewallProfile -All -Enabled True   (as administrator)\n" + APPLY["windows"]
        return [*results, warning("firewall", where, what, why=WHY, cure=cure)]
    if not facts.windows["rules"] or "Any" in facts.windows["docker"]:
        what = "Docker Desktop's own rule opens the published ports to the whole network, or closes them to B."
        return [*results, warning("firewall", where, what, why=WHY, cure=APPLY["windows"])]
    return [*results, ok("firewall", where, "on, with noodle's rules; Docker Desktop's own is narrowed")]


def _lists(text: str) -> dict[str, list[str]] | None:
    try:
        answer: Any = json.loads(text)
        return {name: list(map(str, answer[name] or ())) for name in ("profiles", "networks", "rules", "docker")}
    except (ValueError, KeyError, TypeError):
        return None


def _is_ufw_active() -> bool:
    try:
        return "ENABLED=yes" in UFW_PATH.read_text(encoding="utf-8")
    except OSError:  # no ufw, or this user may not read it
        return False
