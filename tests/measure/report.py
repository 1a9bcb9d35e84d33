"""Sections of docs/measurements.md; a measurement's newest run replaces its section."""

from __future__ import annotations

import datetime
import os
import platform
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

TRANSFORMERS, GGML = "transformers", "ggml"  # measurements of tokens compute in float32
CPUINFO = Path("/proc/cpuinfo")
# of x86, then of arm64
TOLD_FLAGS = (
    "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip
PATH = Path(__file__).parents[2] / "docs" / "measurements.md"


@dataclass
class Section:
    """One measurement: name, heading and lines; a partial one is printed and not written."""

    name: str
    title: str
    lines: list[str] = field(default_factory=list)
    is_partial: bool = False

    def say(self, text: str = "") -> None:
        """Add a line and print it."""
        self.lines.append(text)
        print(text, flush=True)

    def table(self, heads: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Add a table."""
        self.say()
        self.say("| " + " | ".join(heads) + " |")
        self.say("|" + " --- |" * len(heads))
        for row in rows:
            self.say("| " + " | ".join(str(cell) for cell in row) + " |")
        self.say()

    def write(self) -> None:
        """Write the section into the document in place of its older version."""
        if self.is_partial:
            print(f"Only a part was measured: {PATH.name} keeps its section.", flush=True)
            return
        when = datetime.datetime.now(datetime.UTC).date().isoformat()
        conditions = f"{when}, {machine()}, `python -m tests.measure {self.name}`"
        text = "\n".join([f"## {self.title}", "", conditions, "", *self.lines]).rstrip() + "\n"
        text = re.sub(r"\n{3,}", "\n\n", text)
        block = f"<!-- {self.name} -->\n{text}<!-- end {self.name} -->\n"
        document = PATH.read_text(encoding="utf-8")
        pattern = re.compile(rf"<!-- {re.escape(self.name)} -->\n.*?<!-- end {re.escape(self.name)} -->\n", re.S)
        if pattern.search(document):
            document = pattern.sub(lambda _: block, document)
        else:
            document = document.rstrip() + "\n\n" + block
        PATH.write_text(document, encoding="utf-8")


def named(measurement: str, executor: str) -> str:
    """Return the name of a measurement with this executor, for its section and the command line."""
    return measurement if executor == TRANSFORMERS else f"{measurement}={executor}"


def title_of(title: str, executor: str) -> str:
    """Return the heading of a section for this executor."""
    return title if executor == TRANSFORMERS else f"{title} ({executor})"


def machine() -> str:
    """Return cores, processor and its flags, as conditions of a figure."""
    cpu = platform.processor() or "unknown processor"
    for line in CPUINFO.read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    count = len(os.sched_getaffinity(0))
    return ", ".join([f"{count} core{'s' * (count != 1)} of {cpu}", *filter(None, [" ".join(processor_flags())])])


def processor_flags() -> list[str]:
    """Return the processor's flags that choose kernels, as /proc/cpuinfo names them."""
    lines = CPUINFO.read_text(encoding="utf-8").splitlines()
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return [flag for flag in TOLD_FLAGS if flag in flags]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return median and both extremes as text."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"
