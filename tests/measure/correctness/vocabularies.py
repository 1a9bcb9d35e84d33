"""The vocabularies that llama.cpp publishes: ids against those that lie beside them, time to load, memory, speed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from services.coordinator.text.vocabulary.gguf import GgufVocabulary
from tests.measure.report import Section
from tests.support.models.gguf_vocabularies import expected_ids, read_published
from tests.support.models.llama_cpp_source import llama_cpp_models

NAMES = ("llama-spm", "phi-3", "gpt-2", "llama-bpe", "qwen2", "command-r", "gemma-4")
CHARACTERS = 100_000
CHILD_SECONDS = 120.0
HEADS = ["vocabulary", "tokens", "texts equal", "load s", "more MB", "at its peak", "encode s", "decode s"]


def measure() -> Section:
    """Load each vocabulary in a process of its own; times are of the processor."""
    section = Section("vocabularies", "Vocabularies of GGUF files")
    section.say(f"Seconds of the processor, with the header; encode and decode {CHARACTERS:,} characters.")
    rows = []
    for name in NAMES:
        command = [sys.executable, "-m", __name__, str(llama_cpp_models() / f"ggml-vocab-{name}.gguf")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=CHILD_SECONDS, check=True)
        rows.append([name, *json.loads(done.stdout)])
    section.table(HEADS, rows)
    return section


def figures(path: Path) -> list[object]:
    """Return the cells of one vocabulary."""
    before = memory_mb("VmRSS")
    start = time.process_time()
    vocabulary = GgufVocabulary(read_published(path))
    load_seconds = time.process_time() - start
    more, peak = memory_mb("VmRSS") - before, memory_mb("VmHWM") - before
    cases = expected_ids(path)
    equal = sum(vocabulary.encode(text, add_special_tokens=False) == ids for text, ids in cases)
    text = " ".join(text for text, _ in cases)
    text = (text * (CHARACTERS // len(text) + 1))[:CHARACTERS]
    start = time.process_time()
    ids = vocabulary.encode(text, add_special_tokens=False)
    encoded = time.process_time()
    assert vocabulary.decode(ids, skip_special_tokens=True) == text
    decoded = time.process_time()
    seconds = [f"{encoded - start:.2f}", f"{decoded - encoded:.2f}"]
    counts = [f"{vocabulary.size:,}", f"{equal} of {len(cases)}"]
    return [*counts, f"{load_seconds:.2f}", f"{more:.0f}", f"{peak:.0f}", *seconds]


def memory_mb(key: str) -> float:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1024
    raise LookupError(key)


if __name__ == "__main__":
    print(json.dumps(figures(Path(sys.argv[1]))))
