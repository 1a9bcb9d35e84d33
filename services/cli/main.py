"""The noodle command: its options, and which file does what; every error ends here, as one line and its cure."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from noodle import __version__
from noodle.config.environment import command_config, process_environment
from noodle.errors import ConfigurationError, NoodleError

if TYPE_CHECKING:
    from msgspec import Struct

    from noodle.cluster.reports import ReportKind
    from services.cli.client.target import Target

ReportT = TypeVar("ReportT", bound="Struct")
INTERRUPTED_EXIT_CODE = 130  # what shells give for a command ended by Ctrl-C
ERROR_EXIT_CODE = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; gives its exit code (2 after a wrong option, from argparse)."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except NoodleError as error:
        print(f"noodle: {error.message}", file=sys.stderr)
        if error.cure:
            print(f"  {error.cure}", file=sys.stderr)
        return ERROR_EXIT_CODE
    except KeyboardInterrupt:
        return INTERRUPTED_EXIT_CODE
    except BrokenPipeError:
        sys.stderr.close()  # whoever read our output has gone; nothing is left to say, nor to whom
        return ERROR_EXIT_CODE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="noodle", description="One language model, cut by layers over the machines of a home network."
    )
    parser.add_argument("--version", action="version", version=f"noodle {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    up = commands.add_parser("up", help="start everything on this machine and keep it running")
    up.add_argument("--stages", type=_at_least(1), help="stages the model is cut into (NOODLE_STAGES, 2)")
    up.add_argument("--model", help="the default's name, a hub id, a folder or a .gguf file (NOODLE_MODEL)")
    up.add_argument("--split", help="layers per stage, as 10,2; by measured speed unless given (NOODLE_SPLIT)")
    up.add_argument("--detach", action="store_true", help="return when it is ready, and go on in the background")
    up.add_argument("--report-to", type=int, help=argparse.SUPPRESS)  # services/cli/local/detach.py
    up.set_defaults(run=_up)

    down = commands.add_parser("down", help="stop what `noodle up` started")
    down.set_defaults(run=_down)

    status = commands.add_parser("status", help="what runs, where, and how it does")
    status.add_argument("--json", action="store_true", help="as one JSON object")
    status.add_argument("--url", help="the coordinator to ask (the running one, or NOODLE_COORDINATOR_URL)")
    status.set_defaults(run=_status)

    generate = commands.add_parser("generate", help="generate text and stream it to the terminal")
    generate.add_argument("prompt", help="the text to go on from or to answer; - reads standard input")
    generate.add_argument("--max-new-tokens", type=_at_least(1), default=256, help="at most so many tokens (256)")
    generate.add_argument("--temperature", type=_from_to(0.0, 100.0), help="0 always takes the likeliest token (1)")
    generate.add_argument("--top-p", type=_from_to(0.0, 1.0), help="only the likeliest tokens of this much probability")
    generate.add_argument("--seed", type=_at_least(0), help="the same seed draws the same text")
    shape = generate.add_mutually_exclusive_group()
    shape.add_argument("--chat", action="store_false", dest="raw", help="as a question, by the model's chat template")
    shape.add_argument("--raw", action="store_true", help="as text to go on from, without a chat template")
    _add_target(generate)
    generate.set_defaults(run=_generate, raw=False)

    init = commands.add_parser("init", help="make this folder ready for `docker compose up`: .env and secrets")
    init.add_argument("--machine", choices=("single", "a", "b"), help="the whole on one host (the default), or A or B")
    init.add_argument("--address", help="this machine's IPv4 address on the home network")
    init.add_argument("--peer", help="on A: the IPv4 address of machine B")
    init.add_argument("--join", help="on B: the text that `noodle init` printed on A; - reads it from standard input")
    init.add_argument("--gpu", action=argparse.BooleanOptionalAction, help="compute stage 0 on an NVIDIA card")
    init.add_argument("--stages", type=_at_least(1), help="stages of all machines together (NOODLE_STAGES, 2)")
    init.add_argument("--model", help="the default's name, a hub id, or models/NAME in this folder (NOODLE_MODEL)")
    init.add_argument("--name", help="what this machine is called (NOODLE_MACHINE, machine-a or machine-b)")
    init.add_argument("--folder", help="noodle's folder (the current one)")
    init.set_defaults(run=_init)

    leave = commands.add_parser("leave", help="move a stage's layers to the others, so that its machine may go")
    leave.add_argument("--url", help="the stage that leaves (NOODLE_ADVERTISE_URL)")
    leave.set_defaults(run=_leave)

    verify = commands.add_parser("verify", help="compare the cluster's tokens with the unsplit model's")
    verify.add_argument("--prompts", type=_at_least(1), help="how many of the built-in prompts (all)")
    verify.add_argument("--new-tokens", type=_at_least(1), default=64, help="tokens per prompt (64)")
    verify.add_argument("--json", action="store_true", help="as one JSON object")
    _add_target(verify)
    verify.set_defaults(run=_verify)

    bench = commands.add_parser("bench", help="time the cluster against the unsplit model on this machine, in turn")
    bench.add_argument("--streams", type=_counts, help="how many at once, as 1,2,4,8 (the default)")
    bench.add_argument("--prompt-tokens", type=_at_least(1), help="of each stream (128)")
    bench.add_argument("--new-tokens", type=_at_least(1), help="of each stream, past any end of text (64)")
    bench.add_argument("--pairs", type=_at_least(1), help="runs of each side for each number of streams (5)")
    bench.add_argument("--no-control", action="store_true", default=None, help="time the cluster alone")
    _add_report_options(bench)
    _add_target(bench)
    bench.set_defaults(run=_bench)

    profile = commands.add_parser("profile", help="time this machine's layers, embedding and head for the model")
    profile.add_argument("--quick", action="store_true", default=None, help="fewer points and rounds")
    _add_report_options(profile)
    _add_target(profile)
    profile.set_defaults(run=_profile)
    plan = commands.add_parser("plan", help="who gets which layers and why, with memory and predicted speed")
    plan.add_argument("--nodes", metavar="FILE", help="for the machines listed in this JSON file (- is standard input)")
    plan.add_argument("--json", action="store_true", help="as one JSON object")
    _add_target(plan)
    plan.set_defaults(run=_plan)

    doctor = commands.add_parser("doctor", help="what keeps this machine out of the cluster, each with its cure")
    doctor.add_argument("--json", action="store_true", help="as one JSON object")
    doctor.set_defaults(run=_doctor)

    firewall = commands.add_parser("firewall", help="who may come to the ports that this machine publishes")
    act = firewall.add_mutually_exclusive_group()
    act.add_argument("--apply", action="store_true", help="set the rules, now and at each boot (as root)")
    act.add_argument("--undo", action="store_true", help="take them away again (as root)")
    firewall.add_argument(
        "--clients", nargs="+", metavar="ADDRESS", help="addresses or networks of people's machines, for 8080 and 3000"
    )
    firewall.set_defaults(run=_firewall)

    deploy = commands.add_parser("deploy", help="start machine A here and machine B by ssh, and verify both together")
    deploy.add_argument("--remote", required=True, help="machine B: its IP address")
    deploy.add_argument("--user", help="who to be there (as ssh has it)")
    deploy.add_argument("--address", help="this machine's IPv4 address on the home network (the one towards B)")
    deploy.add_argument("--remote-os", choices=("linux", "windows"), help="of machine B (ask it by ssh)")
    deploy.add_argument("--there", help="folder on machine B, from the home of its user (noodle)")
    deploy.add_argument("--ssh-config", metavar="FILE", help="another configuration for ssh: port, key, known hosts")
    deploy.add_argument("--no-verify", action="store_true", help="do not compare tokens with the unsplit model")
    deploy.add_argument("--stop", action="store_true", help="take both machines' sets down; volumes and secrets stay")
    deploy.set_defaults(run=_deploy)

    convert = commands.add_parser("convert", help="make a folder that noodle reads out of a .gguf file (needs torch)")
    convert.add_argument("file", help="the .gguf file")
    convert.add_argument("folder", help="the folder to write")
    convert.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="of the written weights (float32)")
    convert.set_defaults(run=_convert)
    return parser


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", help="the coordinator to ask (the running one, or NOODLE_COORDINATOR_URL)")
    parser.add_argument("--key", help="the API key (NOODLE_API_KEY)")


def _add_report_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", help="folder for the JSON file and the plot (the current one)")
    parser.add_argument("--json", action="store_true", help="print the JSON instead of the table")
    kept = parser.add_mutually_exclusive_group()
    kept.add_argument("--list", action="store_true", help="what the coordinator has kept; nothing is measured")
    kept.add_argument("--show", metavar="ID", help="one of these; nothing is measured")


def _counts(text: str) -> tuple[int, ...]:
    counts = tuple(int(part) for part in text.split(","))
    if min(counts) < 1 or len(set(counts)) < len(counts):
        raise argparse.ArgumentTypeError(f"{text} is not a list of different numbers, as 1,2,4,8")
    return counts


def _at_least(minimum: int) -> type[int]:
    def whole(text: str) -> int:
        number = int(text)
        if number < minimum:
            raise argparse.ArgumentTypeError(f"{text} is less than {minimum}")
        return number

    whole.__name__ = "whole number"  # argparse names it in "invalid whole number value"
    return whole  # type: ignore[return-value]  # argparse takes any callable


def _from_to(minimum: float, maximum: float) -> type[float]:
    def number(text: str) -> float:
        value = float(text)
        if not minimum <= value <= maximum:  # also not a number
            raise argparse.ArgumentTypeError(f"{text} is not from {minimum:g} to {maximum:g}")
        return value

    return number  # type: ignore[return-value]  # argparse takes any callable


# each command imports its own part, so that `noodle --help` is there at once and Windows imports what it can


def _up(options: argparse.Namespace) -> int:
    from services.cli.client.progress import open_progress
    from services.cli.commands.up import already_running, run, wanted_from
    from services.cli.local.detach import report_to, start_detached

    environment = process_environment()
    if options.report_to is not None:
        config, wanted = wanted_from(environment, options.stages, options.model, options.split)
        return report_to(
            options.report_to,
            lambda progress, on_ready: run(config, wanted, environment, progress, is_detached=True, on_ready=on_ready),
        )
    config, wanted = wanted_from(environment, options.stages, options.model, options.split)
    progress = open_progress()
    try:
        if already_running(config, progress):
            return 0
        if not options.detach:
            return run(config, wanted, environment, progress)
        arguments = ["--stages", str(wanted.stage_count), "--model", wanted.model]
        return start_detached(arguments + (["--split", wanted.split] if wanted.split else []), environment, progress)
    finally:
        progress.close()


def _down(_options: argparse.Namespace) -> int:
    from services.cli.commands.down import down

    return down(command_config(process_environment()))


def _status(options: argparse.Namespace) -> int:
    from services.cli.commands.status import status

    return status(command_config(process_environment()), options.url, as_json=options.json)


def _leave(options: argparse.Namespace) -> int:
    from services.cli.commands.leave import leave

    environment = process_environment()
    return leave(command_config(environment), environment.get("NOODLE_ADVERTISE_URL", ""), options.url)


def _generate(options: argparse.Namespace) -> int:
    from services.cli.client.target import find_target
    from services.cli.commands.generate import generate

    target = find_target(command_config(process_environment()), options.url, options.key)
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    parameters = {
        "max_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "seed": options.seed,
    }
    given = {name: value for name, value in parameters.items() if value is not None}
    return generate(target, prompt, given, raw=options.raw)


def _init(options: argparse.Namespace) -> int:
    from services.cli.commands.init import init
    from services.cli.project.machine_settings import Wish

    wish = Wish(
        machine=options.machine,
        address=options.address,
        peer=options.peer,
        gpu=options.gpu,
        stages=options.stages,
        model=options.model,
        name=options.name,
    )
    join_text = sys.stdin.read() if options.join == "-" else options.join  # where other users may read arguments
    return init(Path(options.folder or "."), wish, join_text)


def _verify(options: argparse.Namespace) -> int:
    from services.cli.client.target import find_target
    from services.cli.verify.command import verify

    environment = process_environment()
    config = command_config(environment)
    target = find_target(config, options.url, options.key)
    return verify(target, config, environment, options.prompts, options.new_tokens, as_json=options.json)


def _bench(options: argparse.Namespace) -> int:
    from services.cli.bench.command import BenchWish, bench
    from services.cli.bench.report import BenchReport
    from services.cli.bench.table import print_report
    from services.cli.client.target import find_target

    environment = process_environment()
    config = command_config(environment)
    target = find_target(config, options.url, options.key)
    if _shows_kept(options, ("streams", "prompt_tokens", "new_tokens", "pairs", "no_control", "output")):
        return _show_kept(options, target, "bench", BenchReport, print_report)
    wish = BenchWish(
        streams=options.streams or (1, 2, 4, 8),
        prompt_tokens=options.prompt_tokens or 128,
        new_tokens=options.new_tokens or 64,
        pairs=options.pairs or 5,
        with_control=not options.no_control,
    )
    return bench(target, config, environment, wish, Path(options.output or "."), as_json=options.json)


def _profile(options: argparse.Namespace) -> int:
    from services.cli.bench.profile_command import profile
    from services.cli.bench.profile_report import ProfileReport
    from services.cli.bench.profile_table import print_report
    from services.cli.client.target import find_target

    environment = process_environment()
    config = command_config(environment)
    target = find_target(config, options.url, options.key)
    if _shows_kept(options, ("quick", "output")):
        return _show_kept(options, target, "profile", ProfileReport, print_report)
    output = Path(options.output or ".")
    return profile(target, config, environment, output, is_quick=bool(options.quick), as_json=options.json)


def _shows_kept(options: argparse.Namespace, of_measuring: Sequence[str]) -> bool:
    """Whether kept reports are asked for; raises ConfigurationError beside an option that would do nothing then."""
    if not options.list and options.show is None:
        return False
    given = [f"--{name.replace('_', '-')}" for name in of_measuring if getattr(options, name) is not None]
    if given:
        raise ConfigurationError(
            f"{given[0]} is for measuring, and --list and --show measure nothing.", cure="Leave one of them out."
        )
    return True


def _show_kept(
    options: argparse.Namespace,
    target: Target,
    kind: ReportKind,
    report_type: type[ReportT],
    print_report: Callable[[ReportT], None],
) -> int:
    from services.cli.client.reports import list_reports, print_json, read_report

    if options.list:
        return list_reports(target, kind, as_json=options.json)
    report = read_report(target, options.show, report_type)
    if options.json:
        print_json(report)
    else:
        print_report(report)
    return 0


def _plan(options: argparse.Namespace) -> int:
    from services.cli.client.target import find_target
    from services.cli.commands.plan import plan

    target = find_target(command_config(process_environment()), options.url, options.key)
    return plan(target, options.nodes, as_json=options.json)


def _doctor(options: argparse.Namespace) -> int:
    from services.cli.doctor.command import doctor

    environment = process_environment()
    return doctor(command_config(environment), environment, Path.cwd(), as_json=options.json)


def _firewall(options: argparse.Namespace) -> int:
    from services.cli.commands.firewall import Act, firewall
    from services.cli.project.programs import this_system
    from services.cli.project.project import require_project

    if options.undo and options.clients:
        raise ConfigurationError("--clients is for setting rules, and --undo sets none.", cure="Leave one of them out.")
    act: Act = "apply" if options.apply else "undo" if options.undo else "show"
    return firewall(require_project(Path.cwd()), this_system(), options.clients or (), act)


def _deploy(options: argparse.Namespace) -> int:
    from services.cli.deploy.command import DEFAULT_FOLDER, DeployWish, deploy, stop
    from services.cli.deploy.ssh import Remote

    if options.stop and options.no_verify:
        raise ConfigurationError("--no-verify means nothing with --stop.", cure="Leave it out.")
    wish = DeployWish(
        Remote(options.remote, options.user or "", Path(options.ssh_config) if options.ssh_config else None),
        options.address,
        options.remote_os,
        options.there or DEFAULT_FOLDER,
        is_verified=not options.no_verify,
    )
    return stop(wish, Path.cwd()) if options.stop else deploy(wish, Path.cwd())


def _convert(options: argparse.Namespace) -> int:
    from services.cli.commands.convert import convert

    return convert(options.file, options.folder, options.dtype, process_environment())
