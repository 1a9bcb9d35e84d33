"""The firewall for `noodle doctor`: are the published ports closed to strangers, and open to the other machine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct

from noodle.errors import NoodleError
from services.cli.commands.firewall import SCRIPT_PATH, own_networks
from services.cli.doctor.outcome import Outcome, ok, skipped, warning
from services.cli.project import firewall_rules
from services.cli.project.firewall_rules import CHAIN, DOCKER_CHAIN
from services.cli.project.programs import Run, System
from services.cli.project.project import Project

RULES_SECONDS = 5.0
POWERSHELL_SECONDS = 15.0
UFW_PATH = Path("/etc/ufw/ufw.conf")
APPLY = {
    "linux": "sudo deploy/firewall.sh --apply",
    "windows": "deploy\\firewall.ps1 -Apply   (as administrator)",
    "other": "close the ports by this system's firewall",
}
AS_ROOT = "sudo bash -c 'source deploy/command.sh; noodle doctor'"
WHY = "anyone on the network may knock at them; each has a lock, and one that is not reached needs none"
LOOPBACK_ALONE = "its ports are on 127.0.0.1 alone"
ASK_WINDOWS = (
    "@{profiles=@(Get-NetFirewallProfile | Where-Object Enabled -eq 'True' | ForEach-Object Name); "
    "networks=@(Get-NetConnectionProfile | ForEach-Object { [string]$_.NetworkCategory }); "
    f"rules=@(Get-NetFirewallRule -Group '{firewall_rules.WINDOWS_GROUP}' -ErrorAction SilentlyContinue | "
    "ForEach-Object DisplayName); "
    f"docker=@(Get-NetFirewallRule -DisplayName '{firewall_rules.DOCKER_RULE}' -ErrorAction SilentlyContinue | "
    "Get-NetFirewallAddressFilter | ForEach-Object { [string]$_.RemoteAddress })} | ConvertTo-Json -Compress"
)


class FirewallFacts(Struct, frozen=True):
    """What is known of it; None: could not be read."""

    expected_script: str = ""  # empty: there is nothing to close
    nothing_to_close: str = ""
    script: str | None = None  # what `noodle firewall --apply` left
    rules: tuple[str, ...] | None = None  # of noodle's chain, as iptables shows them
    is_called: bool = False  # by DOCKER-USER
    unread: str = ""  # why the rules could not be read
    is_ufw_active: bool = False
    windows: dict[str, list[str]] | None = None


def gather_firewall(run: Run, system: System, project: Project | None) -> FirewallFacts:
    """Read what this user may."""
    if project is None:
        return FirewallFacts()
    if project.role == "single":
        return FirewallFacts(nothing_to_close=LOOPBACK_ALONE)
    try:
        openings = firewall_rules.openings_of(project, (), own_networks(project) if system == "linux" else ())
        expected = firewall_rules.linux_script(openings, project.lan_address)
    except NoodleError as error:
        return FirewallFacts(nothing_to_close=error.message)
    if system == "windows":
        ran = run(["powershell", "-NoProfile", "-NonInteractive", "-Command", ASK_WINDOWS], POWERSHELL_SECONDS)
        return FirewallFacts(expected, windows=_lists(ran.output) if ran.is_good else None, unread=ran.said)
    try:
        script = SCRIPT_PATH.read_text(encoding="utf-8")
    except OSError:  # never applied
        script = None
    docker = run(["iptables", "-w", "2", "-S", DOCKER_CHAIN], RULES_SECONDS)
    own = run(["iptables", "-w", "2", "-S", CHAIN], RULES_SECONDS)
    rules: tuple[str, ...] | None = None
    unread = ""
    if docker.is_good:
        rules = tuple(line for line in own.output.splitlines() if line.startswith("-A")) if own.is_good else ()
    else:
        unread = "there is no iptables here" if docker.is_missing else docker.said
    is_called = f"-j {CHAIN}" in docker.output
    return FirewallFacts(expected, "", script, rules, is_called, unread, _is_ufw_active())


def check_firewall(facts: FirewallFacts, where: str, system: System) -> list[Outcome]:
    """Open ports are a warning: each of them has its lock."""
    if not facts.expected_script and not facts.nothing_to_close:
        return [skipped("firewall", where, "no container publishes a port to the network here, that .env would tell")]
    if facts.nothing_to_close:
        return [ok("firewall", where, facts.nothing_to_close)]
    if system == "windows":
        return _check_windows(facts, where)
    outcomes = []
    if facts.is_ufw_active:
        outcomes.append(ok("firewall", where, "ufw is on; ports that Docker publishes pass by it"))
    if facts.rules is not None:
        outcomes.append(_check_rules(facts, facts.rules, where, system))
    elif facts.script is None:
        what = "The published ports are open to the whole network (`noodle firewall` was not applied)."
        outcomes.append(warning("firewall", where, what, why=WHY, cure=APPLY[system]))
    else:
        reason = f"rules are set at each boot by {SCRIPT_PATH}; whether they stand now, only root may read"
        outcomes.append(skipped("firewall", where, f"{reason} ({facts.unread}): {AS_ROOT}"))
    return outcomes


def _check_rules(facts: FirewallFacts, rules: Sequence[str], where: str, system: System) -> Outcome:
    if not rules or not facts.is_called:
        what = "The published ports are open to the whole network: no rule closes them."
        return warning("firewall", where, what, why=WHY, cure=APPLY[system])
    missing = sorted(ports_in(facts.expected_script.splitlines()) - ports_in(rules))
    if missing:
        what = f"Rules stand, but not for the ports {', '.join(map(str, missing))} that .env names."
        return warning("firewall", where, what, why=WHY, cure=APPLY[system])
    return ok("firewall", where, f"the ports {', '.join(map(str, sorted(ports_in(rules))))} are closed to strangers")


def ports_in(rules: Sequence[str]) -> set[int]:
    """Ports that are closed to all who are not named."""
    found = set()
    for rule in rules:
        words = rule.split()
        if words[:1] == ["-A"] and words[-1] == "DROP" and "--ctorigdstport" in words:
            found.add(int(words[words.index("--ctorigdstport") + 1]))
    return found


def _check_windows(facts: FirewallFacts, where: str) -> list[Outcome]:
    if facts.windows is None:
        return [skipped("firewall", where, f"PowerShell did not say ({facts.unread})")]
    profiles, networks = facts.windows["profiles"], facts.windows["networks"]
    outcomes = []
    if "Public" in networks:
        outcomes.append(
            warning(
                "firewall",
                where,
                "Windows takes this network for a public one.",
                why="its firewall then drops what the other machine sends",
                cure="Get-NetConnectionProfile | Set-NetConnectionProfile -NetworkCategory Private   (administrator)",
            )
        )
    if not profiles:
        what = "The Windows firewall is off: the published ports are open to the whole network."
        cure = "Set-NetFirewallProfile -All -Enabled True   (as administrator)\n" + APPLY["windows"]
        return [*outcomes, warning("firewall", where, what, why=WHY, cure=cure)]
    if not facts.windows["rules"] or "Any" in facts.windows["docker"]:
        what = "The published ports are open to the whole network by Docker Desktop's own rule, or closed to B."
        return [*outcomes, warning("firewall", where, what, why=WHY, cure=APPLY["windows"])]
    return [*outcomes, ok("firewall", where, "on, with noodle's rules; Docker Desktop's own is narrowed")]


def _lists(text: str) -> dict[str, list[str]] | None:
    try:
        answer: Any = json.loads(text)
        return {name: list(map(str, answer[name] or ())) for name in ("profiles", "networks", "rules", "docker")}
    except (ValueError, KeyError, TypeError):
        return None


def _is_ufw_active() -> bool:
    try:
        return "ENABLED=yes" in UFW_PATH.read_text(encoding="utf-8")
    except OSError:  # no ufw, or not for this user to read
        return False
