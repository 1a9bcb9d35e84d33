"""What a machine reports of a GGUF file: who computes it where ggml is missing, and where transformers is named."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from noodle.config.environment import stage_config
from noodle.errors import ConfigurationError
from services.stage.executors.transformers.gguf_families import only_ggml_computes
from services.stage.selection import report
from services.stage.selection.layer_costs import LayerSeconds
from services.stage.selection.select import ExecutorOptions, choose_executor
from tests.support.models.tiny_gguf import TinyLlama, write_tiny_gguf
from tests.support.stages.executors import need_ggml

REPORT = """
import sys
from pathlib import Path
from noodle.config.environment import stage_config
from services.stage.selection import benchmark
if {is_hidden}:
    sys.modules["ggml"] = None
from services.stage.selection.report import build_machine_report
benchmark.BUDGET_SECONDS = 0.01
settings = {{
    "NOODLE_CLUSTER_TOKEN": "a-long-enough-secret", "NOODLE_CACHE_DIR": {cache!r}, "NOODLE_EXECUTOR": {executor!r},
    "NOODLE_COORDINATOR_URL": "http://127.0.0.1:9", "NOODLE_THREADS": "1", "NOODLE_DEVICE": "cpu",
}}
report = build_machine_report(stage_config(settings), "boot", Path({model!r}), progress=lambda *_: None)
assert (report.executor, report.weights, report.dtype) == ("transformers", "f32", "float32"), report
assert {why!r} in report.choice, report.choice
assert report.decode_layer_seconds > 0, report
"""


@pytest.mark.parametrize(
    ("is_hidden", "executor", "why"),
    [(True, "auto", "ggml is not installed here"), (False, "transformers", "configured")],
)
def test_a_gguf_file_is_measured_by_transformers_where_ggml_is_missing_or_if_it_is_named(
    is_hidden: bool, executor: str, why: str, tmp_path: Path
) -> None:
    model = write_tiny_gguf(tmp_path / "model.gguf", TinyLlama())
    script = REPORT.format(
        is_hidden=is_hidden, executor=executor, why=why, cache=str(tmp_path / "cache"), model=str(model)
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_a_file_that_ggml_alone_computes_is_refused_by_name_with_the_command_that_builds_ggml(tmp_path: Path) -> None:
    model = write_tiny_gguf(tmp_path / "model.gguf", TinyLlama())
    only_ggml = only_ggml_computes(model, {"num_local_experts": 8})
    with pytest.raises(ConfigurationError, match=r"architecture llama with experts, but .*make ggml"):
        choose_executor(ExecutorOptions(), "ggml is not installed here. Run `make ggml`.", only_ggml=only_ggml)
    with pytest.raises(ConfigurationError, match="with experts, where ggml alone computes"):
        choose_executor(ExecutorOptions(executor="transformers"), "", only_ggml=only_ggml)


def test_the_format_of_kv_rows_is_reported_and_refused_by_name_where_heads_are_no_whole_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "_by_ggml", lambda *_, **__: (LayerSeconds(0.1, 0.1, 0.1, 0.1, 0.1), 1, {}))
    settings = {
        "NOODLE_CLUSTER_TOKEN": "a-long-enough-secret",
        "NOODLE_COORDINATOR_URL": "http://127.0.0.1:9",
        "NOODLE_DEVICE": "cpu",
    }

    def kv_dtype(kv_format: str, head_dim: int) -> str:
        model = write_tiny_gguf(tmp_path / f"{head_dim}.gguf", TinyLlama(hidden=4 * head_dim, head_dim=head_dim))
        config = stage_config({**settings, "NOODLE_KV": kv_format})
        return report.build_machine_report(config, "boot", model, progress=lambda *_: None).kv_dtype

    need_ggml()
    found = [kv_dtype(each, 32) for each in ("auto", "f16", "q8_0", "f32")]
    assert found == ["f16", "f16", "q8_0", "f32"]
    assert kv_dtype("f32", 16) == "f32"
    with pytest.raises(ConfigurationError, match=r"NOODLE_KV is q8_0: .* multiple of 32, and this model's is 16"):
        kv_dtype("q8_0", 16)
