"""A stage where torch and transformers are not installed: they are hidden from a process of its own."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.support.models.tiny_model import LAYER_COUNT, tiny_llama_folder

HIDING = Path(__file__).parents[2] / "support" / "without_torch"
TOKEN_IDS = [1, 5, 9, 42]
COMPUTE = f"""
import json, sys
from pathlib import Path
import numpy as np
import services.cli.main, services.coordinator.app, services.planner.app, services.stage.app
from services.stage.executors.base import PackedBatch, Span
from services.stage.executors.candidate import Candidate
from services.stage.executors.load import ggml_hindrance, load_by
from noodle.model.files import read_config

folder = Path(sys.argv[1])
assert ggml_hindrance(read_config(folder), "cpu") == ""
loaded = load_by(
    Candidate("ggml", "f32", "f32", "float32"), folder, 0, {LAYER_COUNT},
    device="cpu", threads=1, context_length=64, cache_dir=None,
)
batch = PackedBatch((Span("a", 0, 4, 8),), np.array([3]), token_ids=np.array({TOKEN_IDS}))
print(json.dumps(loaded.forward(batch).logits[0].tolist()))
"""
ASK = """
from pathlib import Path
from services.stage.executors.candidate import Candidate
from services.stage.executors.load import load_by
load_by(
    Candidate("transformers", "f32", "f32", "float32"), Path("/nowhere"), 0, 1,
    device="cpu", threads=1, context_length=64, cache_dir=None,
)
"""


def run_without_torch(code, *arguments):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HIDING), *filter(None, sys.path)])}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], env=environment, capture_output=True, text=True, check=False
    )


def test_they_are_hidden():
    assert "ModuleNotFoundError" in run_without_torch("import torch").stderr
    assert run_without_torch("from noodle.installation import *; print(has_transformers())").stdout == "False\n"


@pytest.mark.skipif(importlib.util.find_spec("ggml") is None, reason="ggml is not installed (make ggml)")
def test_ggml_computes_what_transformers_computes_where_it_is(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    folder = tiny_llama_folder(tmp_path / "model")
    done = run_without_torch(COMPUTE, folder)
    assert done.returncode == 0, done.stderr
    with torch.inference_mode():
        whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        wanted = whole(input_ids=torch.tensor([TOKEN_IDS])).logits[0, -1].numpy()
    assert np.abs(np.array(json.loads(done.stdout)) - wanted).max() < 1e-4


def test_a_stage_that_is_to_compute_by_transformers_names_the_command_that_installs_it():
    done = run_without_torch(ASK)
    assert "TransformersUnavailable: Computing by transformers needs torch and transformers" in done.stderr
    assert "Run `make transformers`" in done.stderr
