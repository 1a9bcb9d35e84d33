"""The `noodle` command: the table of its commands, each with its options and the function that runs it."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from noodle import __version__
from noodle.errors import NoodleError

INTERRUPTED_EXIT_CODE = 130  # what shells return for a command that Ctrl-C ended
ERROR_EXIT_CODE = 1

AddOption = Callable[[Any], Any]  # adds itself to a parser, or to a group of one


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command. `runs` names its function as module:name, which is imported only when the command runs."""

    runs: str
    help: str
    description: str
    options: tuple[AddOption, ...] = ()

    @property
    def name(self) -> str:
        return self.runs.partition(":")[2]


def option(*flags: str, **settings: Any) -> AddOption:
    return lambda parser: parser.add_argument(*flags, **settings)


def switch(*flags: str, **settings: Any) -> AddOption:
    return option(*flags, action="store_true", **settings)


def one_of(*options: AddOption) -> AddOption:
    """Declare options of which at most one may be given."""

    def add(parser: argparse.ArgumentParser) -> None:
        group = parser.add_mutually_exclusive_group()
        for each in options:
            each(group)

    return add


def at_least(minimum: int) -> Callable[[str], int]:

    def whole(text: str) -> int:
        number = int(text)
        if number < minimum:
            raise argparse.ArgumentTypeError(f"{text} is less than {minimum}")
        return number

    whole.__name__ = "whole number"  # argparse prints it: "invalid whole number value"
    return whole


def between(minimum: float, maximum: float) -> Callable[[str], float]:
    """Parse a number in a closed range; not-a-number is outside it."""

    def number(text: str) -> float:
        value = float(text)
        if not minimum <= value <= maximum:
            raise argparse.ArgumentTypeError(f"{text} is not from {minimum:g} to {maximum:g}")
        return value

    return number


def counts(text: str) -> tuple[int, ...]:
    """Parse different positive numbers, as 1,2,4,8."""
    numbers = tuple(int(part) for part in text.split(","))
    if min(numbers) < 1 or len(set(numbers)) < len(numbers):
        raise argparse.ArgumentTypeError(f"{text} is not a list of different numbers, as 1,2,4,8")
    return numbers


JSON = switch("--json", help="print one JSON object instead of text")
URL = option("--url", metavar="URL", help="coordinator to ask (the one running here, else NOODLE_COORDINATOR_URL)")
TARGET = (URL, option("--key", metavar="KEY", help="API key (NOODLE_API_KEY)"))
REPORT = (
    option("--output", metavar="FOLDER", help="folder for the JSON file and the plot (the current folder)"),
    switch("--json", help="print the report as JSON instead of a table"),
    one_of(
        switch("--list", help="list the reports that the coordinator keeps; measures nothing"),
        option("--show", metavar="ID", help="print one kept report; measures nothing"),
    ),
)
COUNT = at_least(1)

COMMANDS = (
    Command(
        runs="services.cli.commands.up:up",
        help="start everything on this machine and keep it running",
        description=(
            "Starts Valkey, the planner, the stages and the coordinator as processes of this machine, restarts those "
            "that die, and stops everything on Ctrl-C. Needs Linux, no Docker."
        ),
        options=(
            option("--stages", metavar="N", type=COUNT, help="number of stages (NOODLE_STAGES, 2)"),
            option("--model", metavar="M", help="default model's name, hub id, folder or .gguf file (NOODLE_MODEL)"),
            option("--split", metavar="N,N", help="layers of each stage, as 10,2 (NOODLE_SPLIT, by measured speed)"),
            switch("--detach", help="return when it is ready and keep running in the background"),
            option("--report-to", type=int, help=argparse.SUPPRESS),  # see services/cli/local/detach.py
        ),
    ),
    Command(
        runs="services.cli.commands.down:down",
        help="stop what `noodle up` started",
        description=(
            "Stops the `noodle up` of this user and everything it started, and cleans up after one that was killed."
        ),
    ),
    Command(
        runs="services.cli.commands.status:status",
        help="show what runs, where, and its state",
        description=(
            "Shows the state of every service, with its process, port, layers and memory. Exit code 1 if nothing runs."
        ),
        options=(JSON, URL),
    ),
    Command(
        runs="services.cli.commands.generate:generate",
        help="generate text and stream it to the terminal",
        description="Sends one prompt to the coordinator and prints the answer as it is generated.",
        options=(
            option("prompt", metavar="PROMPT", help="text to answer or to continue; - reads it from standard input"),
            option("--max-new-tokens", metavar="N", type=COUNT, default=256, help="most new tokens (%(default)s)"),
            option("--temperature", metavar="T", type=between(0, 100), help="0 always takes the most likely token (1)"),
            option(
                "--top-p", metavar="P", type=between(0, 1), help="share of the probability to sample from, 0 to 1 (1)"
            ),
            option("--seed", metavar="N", type=at_least(0), help="the same seed samples the same text (random)"),
            one_of(
                option(
                    "--chat", action="store_false", dest="raw", default=False, help="use the chat template (default)"
                ),
                switch("--raw", help="continue the text, without a chat template"),
            ),
            *TARGET,
        ),
    ),
    Command(
        runs="services.cli.commands.init:init",
        help="prepare this folder for `docker compose up`: .env and secrets",
        description=(
            "Writes .env and secrets/ for this machine and prints the next steps. Run again, it keeps what is there."
        ),
        options=(
            option(
                "--machine", choices=("single", "a", "b"), help="everything on one host (single, the default), A or B"
            ),
            option("--address", metavar="IP", help="this machine's IPv4 address on the home network (A and B)"),
            option("--peer", metavar="IP", help="machine B's IPv4 address (A)"),
            option("--join", metavar="LINE", help="join line that A printed; - reads it from standard input (B)"),
            option("--gpu", action=argparse.BooleanOptionalAction, help="compute stage 0 on an NVIDIA card (no)"),
            option("--stages", metavar="N", type=COUNT, help="number of stages of all machines (NOODLE_STAGES, 2)"),
            option("--model", metavar="M", help="default model's name, hub id or models/NAME here (NOODLE_MODEL)"),
            option("--name", metavar="NAME", help="name of this machine (NOODLE_MACHINE, machine-a or machine-b)"),
            option("--folder", metavar="FOLDER", default=".", help="noodle's folder (the current folder)"),
        ),
    ),
    Command(
        runs="services.cli.commands.leave:leave",
        help="move a stage's layers to the others so that its machine can go",
        description="Asks a stage to leave, and waits until the active plan has no layers for it.",
        options=(
            option(
                "--url", metavar="URL", help="stage that leaves (NOODLE_ADVERTISE_URL); required if several run here"
            ),
        ),
    ),
    Command(
        runs="services.cli.verify.command:verify",
        help="compare the cluster's tokens with the unsplit model's",
        description=(
            "Generates with the cluster, feeds its tokens to the unsplit model on this machine, and compares. Exit "
            "code 1 if the bound of the cluster's number format is broken."
        ),
        options=(
            option("--prompts", metavar="N", type=COUNT, help="number of built-in prompts to use (all)"),
            option("--new-tokens", metavar="N", type=COUNT, default=64, help="new tokens of each prompt (%(default)s)"),
            JSON,
            *TARGET,
        ),
    ),
    Command(
        runs="services.cli.bench.command:bench",
        help="time the cluster against the unsplit model on this machine",
        description=(
            "Runs the cluster and the unsplit model in turn, prints a table, writes a JSON file and a plot, and "
            "stores the report on the coordinator."
        ),
        options=(
            option("--streams", metavar="N,N", type=counts, help="numbers of concurrent streams (1,2,4,8)"),
            option("--prompt-tokens", metavar="N", type=COUNT, help="prompt tokens of each stream (128)"),
            option("--new-tokens", metavar="N", type=COUNT, help="new tokens of each stream (64)"),
            option("--pairs", metavar="N", type=COUNT, help="runs of each side for each number of streams (5)"),
            switch("--no-control", default=None, help="time the cluster only"),
            *REPORT,
            *TARGET,
        ),
    ),
    Command(
        runs="services.cli.bench.profile:profile",
        help="time this machine's layers, embedding and head for the model",
        description=(
            "Measures what this machine's CPU and card do for the model, and stores the report on the coordinator."
        ),
        options=(switch("--quick", default=None, help="measure fewer points in fewer rounds"), *REPORT, *TARGET),
    ),
    Command(
        runs="services.cli.commands.plan:plan",
        help="show which machine gets which layers and why",
        description=(
            "Shows the plan with its memory and predicted speed. Exit code 1, with what would help, if the model does "
            "not fit."
        ),
        options=(
            option("--nodes", metavar="FILE", help="plan for the machines in this JSON file; - is standard input"),
            JSON,
            *TARGET,
        ),
    ),
    Command(
        runs="services.cli.quality.command:quality",
        help="measure what a format of weights does to the model",
        description=(
            "Scores a text on the running machines and keeps the scores with the format that the cluster computes in; "
            "an interrupted run goes on where it stopped. Run it once as the cluster is by default, start every stage "
            "with another NOODLE_WEIGHTS, and run it again: it prints perplexity and greedy agreement of each format "
            "against the file's own (or against NOODLE_QUALITY=exact, once that was scored)."
        ),
        options=(
            option("--weights", metavar="FORMAT", help="compare only this format, as q4_K (all that were scored)"),
            JSON,
            *TARGET,
        ),
    ),
    Command(
        runs="services.cli.doctor.command:doctor",
        help="find what keeps this machine out of the cluster, with the cure",
        description=(
            "Checks Docker, card, ports, names, firewall, links, plan and memory, before or after the start. Each "
            "finding names the command that cures it. Exit code 1 for errors; warnings do not count."
        ),
        options=(JSON,),
    ),
    Command(
        runs="services.cli.commands.firewall:firewall",
        help="show or set who can connect to the ports that this machine publishes",
        description=(
            "Prints the firewall rules for this machine's part of the cluster. Changes them only with --apply or "
            "--undo."
        ),
        options=(
            one_of(
                switch("--apply", help="set the rules, now and at each boot (as root)"),
                switch("--undo", help="remove the rules (as root)"),
            ),
            option(
                "--clients",
                nargs="+",
                default=(),
                metavar="ADDRESS",
                help="addresses or networks of people's machines, for the coordinator and Grafana (none)",
            ),
        ),
    ),
    Command(
        runs="services.cli.deploy.command:deploy",
        help="start machine A here and machine B by ssh, and verify both",
        description=(
            "Copies noodle to machine B, starts both machines, waits until they are ready, runs `noodle verify` and "
            "prints the URLs. Run again, it changes what has changed."
        ),
        options=(
            option("--remote", metavar="IP", required=True, help="machine B's IP address"),
            option("--user", metavar="USER", default="", help="user on machine B (ssh's configuration)"),
            option("--address", metavar="IP", help="this machine's IPv4 address (the one towards B)"),
            option("--remote-os", choices=("linux", "windows"), help="system of machine B (ask it by ssh)"),
            option("--there", metavar="FOLDER", default="noodle", help="folder on machine B, from home (%(default)s)"),
            option("--ssh-config", metavar="FILE", help="ssh's configuration file: port, key, known hosts (ssh's own)"),
            switch("--no-verify", help="do not compare tokens with the unsplit model"),
            switch("--stop", help="stop both machines; volumes, settings and secrets stay"),
        ),
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; argparse exits with 2 for a wrong option.

    Every NoodleError ends here, as one line and its cure on standard error.
    """
    options = command_parser().parse_args(arguments)
    module, _, function = options.runs.partition(":")
    try:
        return int(getattr(importlib.import_module(module), function)(options))
    except NoodleError as error:
        print(f"noodle: {error.message}", file=sys.stderr)
        if error.cure:
            print(f"  {error.cure}", file=sys.stderr)
        return ERROR_EXIT_CODE
    except KeyboardInterrupt:
        return INTERRUPTED_EXIT_CODE
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone, so there is nowhere to report it
        return ERROR_EXIT_CODE


def command_parser() -> argparse.ArgumentParser:
    """Build the parser from COMMANDS. It imports no command, so `noodle --help` is fast and works on Windows."""
    parser = argparse.ArgumentParser(
        prog="noodle", description="Serve one language model, split by layers over the machines of a home network."
    )
    parser.add_argument("--version", action="version", version=f"noodle {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="command")
    for each in COMMANDS:
        subparser = subparsers.add_parser(each.name, help=each.help, description=each.description)
        subparser.set_defaults(runs=each.runs)
        for add_option in each.options:
            add_option(subparser)
    return parser
