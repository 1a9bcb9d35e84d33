"""Another machine by ssh: runs commands there, and finds out why they cannot run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from noodle.errors import StartError
from services.cli.project.programs import Ran, System, follow_program, run_program

CONNECT_SECONDS = 8  # connecting by ssh
SILENCE_SECONDS = 15  # without data, after which ssh asks whether the other side is still there
SILENCES = 4  # unanswered questions, after which ssh gives up
PROBE_SECONDS = 30.0  # the first command on another machine
SSH_FAILED_CODE = 255  # ssh's own failures
NOT_FOUND_CODE = 127  # a shell's, for a missing program

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
    """Another machine, and how to call ssh; ssh's own configuration has everything else."""

    host: str
    user: str = ""
    config_path: Path | None = None

    @property
    def name(self) -> str:
        """The argument of ssh."""
        return f"{self.user}@{self.host}" if self.user else self.host

    def command(self, script: str) -> list[str]:
        """Return the arguments that run a line of shell there; ssh never asks on the terminal."""
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

    def shell(self, script: str, seconds: float) -> Ran:
        return run_program(self.command(f"sh -c {shlex.quote(script)}"), seconds)

    def follow(self, script: str, seconds: float, log: Callable[[str], None], sent: bytes = b"") -> Ran:
        """Run a script of sh that takes minutes, with `sent` on its standard input; log its lines."""
        return follow_program(self.command(f"sh -c {shlex.quote(script)}"), seconds, log, sent=sent)


def ssh_problem(ran: Ran) -> SshProblem | None:
    """Return why ssh itself failed, None if it did not."""
    if ran.is_missing:
        return "no_ssh"
    if ran.is_late:
        return "unreachable"
    if ran.code != SSH_FAILED_CODE:
        return None
    output = f"{ran.errors}\n{ran.output}"
    return next((problem for problem, pattern in PATTERNS if re.search(pattern, output, re.IGNORECASE)), "other")


def refusal(problem: SshProblem, remote: Remote, detail: str, here: System) -> StartError:
    """Return the error for a problem, with its cure for a person at this machine."""
    name, host = remote.name, remote.host
    copy_key = (
        f'type "$Env:UserProfile\\.ssh\\id_ed25519.pub" | ssh {name} "cat >> .ssh/authorized_keys"'
        if here == "windows"
        else f"ssh-copy-id {name}"
    )
    messages: dict[SshProblem, tuple[str, str]] = {
        "no_ssh": (
            "ssh is not installed on this machine.",
            "Add-WindowsCapability -Online -Name OpenSSH.Client~~~~0.0.1.0"
            if here == "windows"
            else "sudo apt-get install -y openssh-client",
        ),
        "unreachable": (
            f"{host} does not answer: it is off, on another network, or a firewall drops ssh ({detail}).",
            f"ping {host}; on that machine open port 22 (Linux with ufw: sudo ufw allow ssh).",
        ),
        "refused": (
            f"{host} is up, but no ssh server listens on it.",
            "There: sudo apt-get install -y openssh-server (Linux); or Add-WindowsCapability -Online -Name "
            "OpenSSH.Server~~~~0.0.1.0; Start-Service sshd (Windows, as administrator).",
        ),
        "no_such_name": (f"The name {host!r} does not resolve here.", "Give the machine's IP address."),
        "key_refused": (
            f"{name} refuses this user's key ({detail}).",
            f"{copy_key}   (asks for the password once; make a key first with ssh-keygen -t ed25519; "
            "another user there: --user NAME)",
        ),
        "host_unknown": (
            f"This machine does not know the host key of {host}.",
            f"ssh {name}   (once, by hand: compare the fingerprint with `ssh-keygen -lf "
            "/etc/ssh/ssh_host_ed25519_key.pub` there, and answer yes)",
        ),
        "host_changed": (
            f"{host} has another host key than before: it was reinstalled, or another machine answers there.",
            f"If you know why: ssh-keygen -R {host}, then ssh {name} once by hand. If not, stop here.",
        ),
        "other": (f"ssh to {name} failed: {detail}.", f"ssh -v {name}   (shows why)"),
    }
    message, cure = messages[problem]
    return StartError(message, cure=cure)


def system_of(remote: Remote, here: System) -> System:
    """Return the system of the other machine; raises StartError if it cannot be asked."""
    ran = run_program(remote.command("uname -s"), PROBE_SECONDS)
    if (problem := ssh_problem(ran)) is not None:
        raise refusal(problem, remote, ran.last_line, here)
    if "Linux" in ran.output:
        return "linux"
    if ran.is_good and not re.search(r"MINGW|MSYS|CYGWIN", ran.output):
        return "other"
    ran = run_program(remote.command("echo %OS% $Env:OS"), PROBE_SECONDS)  # cmd knows the first, PowerShell the second
    return "windows" if "Windows_NT" in ran.output else "other"
