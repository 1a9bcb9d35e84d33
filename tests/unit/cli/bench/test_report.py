"""The remarks of `noodle bench`, the resources of the control, and the prompts."""

from pathlib import Path

import pytest

from noodle.cluster.measuring import ControlReady
from services.cli.bench.cluster import prompts_of
from services.cli.bench.control import control_question
from services.cli.bench.report import (
    BenchConditions,
    Figures,
    Ratio,
    StageConditions,
    StreamsResult,
    computing_lines,
    headline,
    remarks,
)

HERE, THERE = "laptop", "desktop"


def stage(stage_id=0, machine=HERE, dtype="float32", device="cpu", threads=1, executor="", weights=""):
    return StageConditions(stage_id, machine, 15, dtype, device, "a processor", threads, executor, weights)


def control(dtype="float32", device="cpu", threads=2):
    return ControlReady(device, "a processor", dtype, threads, 2, 1, "2.14.1", "5")


def conditions_of(stages, with_control=None, cores=2, load=0.0, control_model="m"):
    return BenchConditions(
        noodle_version="0.1.0",
        coordinator_version="0.1.0",
        url="http://127.0.0.1:8080",
        stages=tuple(stages),
        plan_version=1,
        plan_reason="",
        context_length=256,
        model_digest="",
        control_model=control_model,
        prompt_tokens=8,
        new_tokens=8,
        pairs=1,
        warm_up_tokens=4,
        cores=cores,
        load_average=load,
        control=with_control,
    )


def remarks_on(stages, with_control=None, streams=(1,), cores=2, load=0.0, control_model="m"):
    conditions = conditions_of(stages, with_control, cores, load, control_model)
    return " ".join(remarks(conditions, streams, HERE, "m"))


def test_an_even_comparison_is_not_called_unequal():
    assert "nequal" not in remarks_on([stage(0), stage(1)], control())
    assert "not idle" not in remarks_on([stage(0), stage(1)], control())


def test_unequal_number_formats_are_reported():
    assert "float16 and float32, the control in float32" in remarks_on([stage(0, dtype="float16"), stage(1)], control())
    text = remarks_on([stage(0, dtype="bfloat16"), stage(1, dtype="bfloat16")], control())
    assert "the cluster computes in bfloat16, the control in float32" in text


def test_weights_in_a_format_of_ggml_are_named_as_such_and_are_unequal_to_the_control():
    stored = stage(executor="ggml", weights="stored")
    assert "the cluster computes in stored, the control in float32" in remarks_on([stored], control())
    assert "number formats" not in remarks_on([stage(executor="ggml", weights="f32")], control())


def test_a_stage_is_shown_with_what_computes_in_it():
    shown = [
        stage(executor="ggml", weights="stored"),
        stage(executor="ggml", weights="f32"),
        stage(executor="transformers", weights="bf16", dtype="bfloat16", threads=2),
        stage(),
    ]
    ends = ["ggml stored, 1 thread", "ggml float32, 1 thread", "transformers bfloat16, 2 threads", "float32, 1 thread"]
    lines = computing_lines(conditions_of(shown))
    assert lines == [f"stage 0: {HERE}, 15 layers, cpu (a processor), {end}" for end in ends]


def test_unequal_threads_machines_and_devices_are_reported():
    stages = [stage(0, threads=2), stage(1, machine=THERE, threads=6, device="cuda")]
    text = remarks_on(stages, control())
    assert "2 + 6, the control has 2" in text
    assert "the cluster is desktop, laptop; the control is laptop alone" in text
    assert "compute on cpu and cuda, the control on cpu" in text


def test_a_stage_that_does_not_report_its_threads_is_not_taken_for_equal():
    assert "Not every stage reports" in remarks_on([stage(0, threads=0), stage(1)], control())


def test_more_threads_than_cores_and_a_busy_machine_are_reported():
    assert "4 threads for its 2 cores" in remarks_on([stage(0, threads=2), stage(1, threads=2)], control(threads=2))
    assert "not idle" in remarks_on([stage()], control(), load=1.5)
    assert "not idle" not in remarks_on([stage()], control(), load=None)


def test_what_several_streams_and_one_stream_mean_is_reported():
    assert "one batch through generate()" in remarks_on([stage()], control(), streams=(1, 2))
    assert "one batch" not in remarks_on([stage()], control(), streams=(1,))
    assert "one after another" in remarks_on([stage(0), stage(1)], control(), streams=(1, 2))
    assert "one after another" not in remarks_on([stage(0), stage(1)], control(), streams=(2,))


def test_a_missing_control_and_another_model_are_reported():
    assert "no control" in remarks_on([stage()])
    assert "model is m, the control's is other" in remarks_on([stage()], control(), control_model="other")


def question(stages, stage_cores=(), own_cores=8):
    return control_question(Path("/model"), 256, stages, HERE, stage_cores=stage_cores, own_cores=own_cores)


def test_the_control_gets_what_the_stages_of_this_machine_have():
    asked = question([stage(0, threads=2), stage(1, threads=3)], stage_cores=(0, 1, 2, 3, 4, 5))
    assert (asked.threads, asked.cores, asked.dtype, asked.device) == (5, (0, 1, 2, 3, 4, 5), "float32", "cpu")


def test_stages_of_other_machines_give_the_control_nothing():
    asked = question([stage(0, threads=2), stage(1, machine=THERE, threads=6)])
    assert (asked.threads, asked.cores) == (2, ())


def test_without_a_stage_here_the_control_has_the_whole_machine():
    asked = question([stage(1, machine=THERE, threads=6, device="cuda", dtype="float16")])
    assert (asked.threads, asked.device, asked.dtype) == (8, "cpu", "float16")


def test_the_control_never_has_more_threads_than_cores():
    assert question([stage(0, threads=2), stage(1, threads=2)], stage_cores=(0, 1)).threads == 2
    assert question([stage(0, threads=4)], own_cores=2).threads == 2


@pytest.mark.parametrize(
    ("here", "there", "expected"),
    [
        ("float16", "float16", "float16"),
        ("bfloat16", "float32", "bfloat16"),
        ("float32", "float16", "float32"),
    ],
)
def test_the_control_computes_in_the_clusters_format_or_in_that_of_this_machine(here, there, expected):
    assert question([stage(0, dtype=here), stage(1, machine=THERE, dtype=there)]).dtype == expected


def test_two_formats_on_this_machine_make_it_float32_and_a_card_here_is_used():
    asked = question([stage(0, dtype="float16", device="cuda"), stage(1, dtype="bfloat16")])
    assert (asked.dtype, asked.device) == ("float32", "cuda")


def test_prompts_are_the_same_for_the_same_run_and_begin_unlike_any_other():
    text = tuple(range(1000))
    assert prompts_of(text, 50, 4, 2) == prompts_of(text, 50, 4, 2)
    firsts = {prompt[0] for run in range(5) for prompt in prompts_of(text, 50, 4, run)}
    assert len(firsts) == 20
    assert all(len(prompt) == 50 for prompt in prompts_of(text, 50, 4, 2))
    assert all(len(prompt) == 50 for prompt in prompts_of((5, 6, 7), 50, 4, 2))


def test_the_headline_names_every_number_of_streams():
    figures = Figures(0.1, 0.1, 0.1, 3, 10.0, 20.04, (20.04,))
    results = [StreamsResult(1, figures, figures, Ratio(0.98, 0.9, 1.0)), StreamsResult(4, figures)]
    assert headline(results) == "tokens/s by streams: 1: 20.0 (0.98 x), 4: 20.0"
