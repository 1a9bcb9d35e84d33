"""Another machine by ssh: runs commands there, and tells apart why they can not be run; knows nothing of noodle."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from noodle.errors import StartError
from services.cli.project.programs import Ran, System, follow_program, run_program

CONNECT_SECONDS = 8
SILENCE_SECONDS = 15  # then ssh asks whether the other side is still there
SILENCES = 4  # without an answer, until it gives up
PROBE_SECONDS = 30.0
SSH_FAILED_CODE = 255  # ssh's own failures
NOT_FOUND_CODE = 127  # a shell's word for a program that is not there

SshProblem = Literal[
    "no_ssh", "unreachable", "refused", "no_such_name", "key_refused", "host_unknown", "host_changed", "other"
]

PATTERNS: tuple[tuple[SshProblem, str], ...] = (
    ("host_changed", r"REMOTE HOST IDENTIFICATION HAS CHANGED"),
    ("host_unknown", r"Host key verification failed|No .* host key is known"),
    ("key_refused", r"Permission denied|Too many authentication failures|no mutual signature"),
    ("no_such_name", r"Could not resolve hostname"),
    ("refused", r"Connection refused"),
    ("unreachable", r"timed out|No route to host|Network is unreachable|Host is down"),
)


@dataclass(frozen=True)
class Remote:
    """Who is meant, and how ssh is to be called; ssh's own configuration holds for all that is not said."""

    host: str
    user: str = ""
    config_path: Path | None = None

    @property
    def name(self) -> str:
        """As one writes it behind ssh."""
        return f"{self.user}@{self.host}" if self.user else self.host

    def command(self, script: str) -> list[str]:
        """The arguments that run a line of shell there; never asks anything of the terminal."""
        options = [
            "BatchMode=yes",
            f"ConnectTimeout={CONNECT_SECONDS}",
            f"ServerAliveInterval={SILENCE_SECONDS}",
            f"ServerAliveCountMax={SILENCES}",
        ]
        config = ["-F", str(self.config_path)] if self.config_path is not None else []
        return ["ssh", *config, *(part for option in options for part in ("-o", option)), self.name, script]

    def run(self, arguments: Sequence[str], seconds: float) -> Ran:
        """Run a program there to its end, as run_program does here."""
        ran = run_program(self.command(shlex.join(arguments)), seconds)
        return Ran(ran.code, ran.output, ran.errors, is_missing=True) if ran.code == NOT_FOUND_CODE else ran

    def shell(self, script: str, seconds: float, sent: str = "") -> Ran:
        """Run a script of sh there, `sent` on its standard input."""
        return run_program(self.command(f"sh -c {shlex.quote(script)}"), seconds, sent=sent)

    def follow(self, script: str, seconds: float, say: Callable[[str], None], sent: bytes = b"") -> Ran:
        """The same for what takes minutes."""
        return follow_program(self.command(f"sh -c {shlex.quote(script)}"), seconds, say, sent=sent)


def ssh_problem(ran: Ran) -> SshProblem | None:
    """Why ssh itself failed, None when it did not."""
    if ran.is_missing:
        return "no_ssh"
    if ran.is_late:
        return "unreachable"
    if ran.code != SSH_FAILED_CODE:
        return None
    said = f"{ran.errors}\n{ran.output}"
    return next((problem for problem, pattern in PATTERNS if re.search(pattern, said, re.IGNORECASE)), "other")


def refusal(problem: SshProblem, remote: Remote, said: str, here: System) -> StartError:
    """What happened and what to do, for a person at this machine."""
    name, host = remote.name, remote.host
    copy_key = (
        f'type "$Env:UserProfile\\.ssh\\id_ed25519.pub" | ssh {name} "cat >> .ssh/authorized_keys"'
        if here == "windows"
        else f"ssh-copy-id {name}"
    )
    messages: dict[SshProblem, tuple[str, str]] = {
        "no_ssh": (
            "There is no ssh on this machine.",
            "Add-WindowsCapability -Online -Name OpenSSH.Client~~~~0.0.1.0"
            if here == "windows"
            else "sudo apt-get install -y openssh-client",
        ),
        "unreachable": (
            f"{host} does not answer: it is off, on another network, or a firewall drops what comes for ssh ({said}).",
            f"ping {host}; on that machine let port 22 in (Linux with ufw: sudo ufw allow ssh).",
        ),
        "refused": (
            f"{host} is there, but no ssh server listens on it.",
            "There: sudo apt-get install -y openssh-server (Linux); or Add-WindowsCapability -Online -Name "
            "OpenSSH.Server~~~~0.0.1.0; Start-Service sshd (Windows, as administrator).",
        ),
        "no_such_name": (f"The name {host!r} does not resolve here.", "Give the machine's IP address."),
        "key_refused": (
            f"{name} refuses this user's key ({said}).",
            f"{copy_key}   (asks for the password once; make a key first with ssh-keygen -t ed25519; "
            "another user there: --user NAME)",
        ),
        "host_unknown": (
            f"This machine has never seen {host}, so its host key is not known.",
            f"ssh {name}   (once, by hand: compare the fingerprint with `ssh-keygen -lf "
            "/etc/ssh/ssh_host_ed25519_key.pub` there, and say yes)",
        ),
        "host_changed": (
            f"{host} shows another host key than before: it was installed anew, or somebody else answers there.",
            f"If you know why: ssh-keygen -R {host}, then ssh {name} once by hand. If not, do not go on.",
        ),
        "other": (f"ssh to {name} failed: {said}.", f"ssh -v {name}   (says why)"),
    }
    message, cure = messages[problem]
    return StartError(message, cure=cure)


def system_of(remote: Remote, here: System) -> System:
    """Which system answers there; raises StartError with the reason when none does."""
    ran = run_program(remote.command("uname -s"), PROBE_SECONDS)
    if (problem := ssh_problem(ran)) is not None:
        raise refusal(problem, remote, ran.said, here)
    if "Linux" in ran.output:
        return "linux"
    if ran.is_good and not re.search(r"MINGW|MSYS|CYGWIN", ran.output):
        return "other"
    ran = run_program(remote.command("echo %OS% $Env:OS"), PROBE_SECONDS)  # cmd knows the first, PowerShell the second
    return "windows" if "Windows_NT" in ran.output else "other"
