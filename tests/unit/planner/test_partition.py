import itertools
import math
import random
import time

import pytest

from noodle.cluster.plan import MachineReport, ModelShape, Plan
from noodle.errors import ConfigurationError, PlanDoesNotFit
from services.planner.partition import USABLE_SHARE, partition


def a_shape(layer_bytes: tuple[int, ...] = (100,) * 12, **changes: object) -> ModelShape:
    values: dict[str, object] = {
        "digest": "d" * 64,
        "name": "a-model",
        "model_type": "llama",
        "layer_count": len(layer_bytes),
        "hidden_size": 64,
        "vocab_size": 1000,
        "context_length": 2048,
        "stored_item_bytes": 4.0,
        "layer_bytes": layer_bytes,
        "embedding_bytes": 50,
        "head_bytes": 60,
        "kv_items_per_token_per_layer": 1,
    }
    return ModelShape(**{**values, **changes})  # type: ignore[arg-type]


def a_machine(stage_id: int, **changes: object) -> MachineReport:
    values: dict[str, object] = {
        "stage_id": stage_id,
        "machine": f"machine-{stage_id}",
        "url": f"http://127.0.0.1:{8081 + stage_id}",
        "boot_id": "boot",
        "noodle_version": "0.1.0",
        "model_digest": "d" * 64,
        "device": "cpu",
        "device_name": "a cpu",
        "dtype": "float32",
        "threads": 1,
        "free_bytes": 1 << 40,
        "decode_layer_seconds": 0.001,
        "prefill_layer_seconds_per_token": 0.0001,
        "head_decode_seconds": 0.0,
    }
    return MachineReport(**{**values, **changes})  # type: ignore[arg-type]


def cut(
    shape: ModelShape, machines: list[MachineReport], split: tuple[int, ...] | None = None, kv_tokens: int = 0
) -> Plan:
    return partition(shape, machines, split, kv_tokens=kv_tokens)


def usable(byte_count: int) -> int:
    """Free bytes of which `byte_count` may be used."""
    return math.ceil(byte_count / USABLE_SHARE)


def layers(plan: Plan) -> list[int]:
    return [stage.end_layer - stage.start_layer for stage in plan.stages]


def test_two_equal_machines_share_the_layers_evenly() -> None:
    plan = cut(a_shape(), [a_machine(0), a_machine(1)])
    assert layers(plan) == [6, 6]
    assert (plan.version, plan.model_digest, plan.context_length) == (0, "d" * 64, 2048)
    assert [(stage.start_layer, stage.end_layer) for stage in plan.stages] == [(0, 6), (6, 12)]


def test_a_machine_three_times_as_fast_gets_three_times_the_layers() -> None:
    plan = cut(a_shape(), [a_machine(0, decode_layer_seconds=0.001), a_machine(1, decode_layer_seconds=0.003)])
    assert layers(plan) == [9, 3]


def test_the_head_counts_against_the_last_stage() -> None:
    plan = cut(a_shape(), [a_machine(0), a_machine(1, head_decode_seconds=0.004)])
    assert layers(plan) == [7, 5]  # [8, 4] by decode alone, but a prompt's tokens need no head
    assert plan.stages[1].decode_seconds == pytest.approx(0.009)


def test_where_all_have_measured_steps_that_sessions_share_layers_are_divided_by_those() -> None:
    batched = {"batched_layer_seconds": 0.0005, "batched_head_seconds": 0.0005}
    machines = [a_machine(0, **batched), a_machine(1, head_decode_seconds=0.02, **batched)]
    assert layers(cut(a_shape(), machines)) == [6, 6]
    machines[0] = a_machine(0)
    assert layers(cut(a_shape(), machines)) == [11, 1]  # by a lone token again, to compare like with like


def test_stages_stand_in_the_order_of_their_numbers() -> None:
    plan = cut(a_shape(), [a_machine(7), a_machine(2)])
    assert [stage.stage_id for stage in plan.stages] == [2, 7]


def test_one_stage_takes_everything() -> None:
    plan = cut(a_shape(), [a_machine(0)])
    assert layers(plan) == [12]
    assert plan.stages[0].weight_bytes == 12 * 100 + 50 + 60


def test_half_the_item_size_is_half_the_bytes() -> None:
    plan = cut(a_shape(), [a_machine(0, dtype="float16")])
    assert plan.stages[0].weight_bytes == (12 * 100 + 50 + 60) // 2


def test_as_many_stages_as_layers_get_one_layer_each() -> None:
    assert layers(cut(a_shape(), [a_machine(number) for number in range(12)])) == [1] * 12


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(PlanDoesNotFit, match="13 stages for the 12 layers") as caught:
        cut(a_shape(), [a_machine(number) for number in range(13)])
    assert "at most 12" in caught.value.cure


def test_no_stage_is_refused() -> None:
    with pytest.raises(PlanDoesNotFit, match="no stage"):
        cut(a_shape(), [])


def test_two_stages_of_the_same_number_are_refused() -> None:
    with pytest.raises(PlanDoesNotFit, match="same number"):
        cut(a_shape(), [a_machine(1), a_machine(1)])


def test_a_split_by_hand_is_used_unchanged() -> None:
    plan = cut(a_shape(), [a_machine(0), a_machine(1, decode_layer_seconds=1.0)], (10, 2))
    assert layers(plan) == [10, 2]
    assert "NOODLE_SPLIT=10,2" in plan.reason


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ((10, 1), "adds up to 11 layers, but a-model has 12"),
        ((10, 3), "adds up to 13"),
        ((12,), "is for 1 stages, but there are 2"),
        ((4, 4, 4), "is for 3 stages, but there are 2"),
        ((12, 0), "gives a stage 0 layers"),
        ((13, -1), "gives a stage -1 layers"),
    ],
)
def test_an_impossible_split_is_refused_with_its_numbers(split: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        cut(a_shape(), [a_machine(0), a_machine(1)], split)


def test_a_split_that_does_not_fit_names_the_stage_and_the_bytes() -> None:
    machines = [a_machine(0, free_bytes=usable(500)), a_machine(1)]
    with pytest.raises(PlanDoesNotFit, match=r"stage 0 needs 1050 bytes.* 550 bytes short"):
        cut(a_shape(), machines, (10, 2))


def test_a_small_memory_gets_fewer_layers_than_its_speed_would_give() -> None:
    # 50 of embedding and 3 layers of 100 fit, not 4
    plan = cut(a_shape(), [a_machine(0, free_bytes=usable(400)), a_machine(1)])
    assert layers(plan) == [3, 9]


def test_kv_rows_need_room_beside_the_weights() -> None:
    # 50 of embedding, and per layer 100 of weights and 25 rows of one float32
    plan = cut(a_shape(), [a_machine(0, free_bytes=usable(450)), a_machine(1)], kv_tokens=25)
    assert layers(plan) == [2, 10]


def test_too_little_memory_is_refused_with_the_missing_bytes() -> None:
    with pytest.raises(PlanDoesNotFit, match=r" 310 bytes short") as caught:
        cut(a_shape(), [a_machine(0, free_bytes=usable(1000))])
    assert "NOODLE_WEIGHTS" in caught.value.cure


def test_stages_of_one_machine_share_its_memory() -> None:
    machines = [
        a_machine(0, machine="laptop", free_bytes=usable(700)),
        a_machine(1, machine="laptop", free_bytes=usable(700)),
        a_machine(2, machine="tower", decode_layer_seconds=0.01),
    ]
    # each alone would hold 6 layers, both together hold 50 of embedding and 6 layers in 700 bytes
    counts = layers(cut(a_shape(), machines))
    assert (counts[0] + counts[1], counts[2]) == (6, 6)


def test_two_devices_of_one_machine_have_their_own_memories() -> None:
    machines = [
        a_machine(0, machine="laptop", device="cuda", free_bytes=usable(700)),
        a_machine(1, machine="laptop", free_bytes=usable(700)),
    ]
    assert layers(cut(a_shape(), machines)) == [6, 6]


def test_other_weights_than_the_planners_are_refused_by_the_stages_number() -> None:
    with pytest.raises(PlanDoesNotFit, match=r"Stage 1 \(machine-1\) has other weights"):
        cut(a_shape(), [a_machine(0), a_machine(1, model_digest="e" * 64)])


@pytest.mark.parametrize(
    "changes",
    [
        {"decode_layer_seconds": 0.0},
        {"decode_layer_seconds": float("nan")},
        {"prefill_layer_seconds_per_token": float("inf")},
        {"head_decode_seconds": -1.0},
        {"batched_layer_seconds": -1.0},
        {"batched_head_seconds": float("inf")},
        {"dtype": "float3"},
    ],
)
def test_absurd_measurements_are_refused_by_the_stages_number(changes: dict[str, object]) -> None:
    with pytest.raises(PlanDoesNotFit, match="Stage 1"):
        cut(a_shape(), [a_machine(0), a_machine(1, **changes)])


def test_the_reason_has_the_prediction_and_its_source() -> None:
    plan = cut(a_shape(), [a_machine(0), a_machine(1)])
    assert "66.7 tokens/s" in plan.reason  # 12 ms of layers and 3 hops of 1 ms
    assert "assumed" in plan.reason


def every_cut(layer_count: int, stage_count: int) -> list[tuple[int, ...]]:
    return [
        tuple(end - start for start, end in itertools.pairwise((0, *ends, layer_count)))
        for ends in itertools.combinations(range(1, layer_count), stage_count - 1)
    ]


def brute_force(shape: ModelShape, machines: list[MachineReport], kv_tokens: int) -> tuple[float, float] | None:
    """The best (slowest stage, sum) over every cut, written without any of the product's code."""
    best = None
    item_bytes = {"float32": 4, "float16": 2}
    for counts in every_cut(shape.layer_count, len(machines)):
        start, seconds = 0, []
        held: dict[str, float] = {}
        free: dict[str, float] = {}
        for number, (machine, count) in enumerate(zip(machines, counts, strict=True)):
            stored = sum(shape.layer_bytes[start : start + count])
            stored += shape.embedding_bytes if number == 0 else 0
            is_last = number == len(machines) - 1
            stored += shape.head_bytes if is_last else 0
            size = item_bytes[machine.dtype]
            used = stored * size / shape.stored_item_bytes + count * kv_tokens * size
            held[machine.machine] = held.get(machine.machine, 0) + used
            free[machine.machine] = min(free.get(machine.machine, 1e30), machine.free_bytes * USABLE_SHARE)
            layer_seconds = machine.decode_layer_seconds + 4 * machine.prefill_layer_seconds_per_token
            seconds.append(count * layer_seconds + (machine.head_decode_seconds if is_last else 0))
            start += count
        if all(held[name] <= free[name] for name in held):
            figure = (max(seconds), sum(seconds))
            best = figure if best is None or figure < best else best
    return best


@pytest.mark.parametrize("seed", range(300))
def test_no_cut_is_better_than_the_one_chosen(seed: int) -> None:
    draw = random.Random(seed)
    layer_count = draw.randint(1, 10)
    stage_count = draw.randint(1, min(layer_count, 5))
    shape = a_shape(tuple(draw.choice((100, 100, 250)) for _ in range(layer_count)))
    # few different speeds, so that ties are common; few machines, so that memory is shared
    machines = [
        a_machine(
            number,
            machine=f"machine-{draw.randint(0, 2)}",
            decode_layer_seconds=draw.choice((0.25, 0.5, 1.0)),
            head_decode_seconds=draw.choice((0.0, 0.5)),
            dtype=draw.choice(("float32", "float16")),
            free_bytes=draw.randint(100, 250 * layer_count + 500),
        )
        for number in range(stage_count)
    ]
    kv_tokens = draw.choice((0, 10))
    expected = brute_force(shape, machines, kv_tokens)
    if expected is None:
        with pytest.raises(PlanDoesNotFit, match="bytes short"):
            cut(shape, machines, kv_tokens=kv_tokens)
        return
    plan = cut(shape, machines, kv_tokens=kv_tokens)
    prompt_seconds = [4 * machine.prefill_layer_seconds_per_token for machine in machines]
    seconds = [
        stage.decode_seconds + count * each
        for stage, count, each in zip(plan.stages, layers(plan), prompt_seconds, strict=True)
    ]
    assert (max(seconds), sum(seconds)) == pytest.approx(expected)
    assert [plan.stages[0].start_layer, plan.stages[-1].end_layer] == [0, layer_count]
    assert all(one.end_layer == two.start_layer for one, two in itertools.pairwise(plan.stages))
    assert min(layers(plan)) >= 1


def test_the_bytes_that_are_short_are_enough_when_added() -> None:
    shape = a_shape()
    free_bytes = usable(300)
    machines = [a_machine(number, machine=f"machine-{number % 2}", free_bytes=free_bytes) for number in range(3)]
    with pytest.raises(PlanDoesNotFit) as caught:
        cut(shape, machines)
    short = int(caught.value.message.split(" bytes short")[0].split()[-1])
    more = [a_machine(one.stage_id, machine=one.machine, free_bytes=usable(300 + short)) for one in machines]
    assert sum(layers(cut(shape, more))) == 12


def test_a_hundred_layers_on_sixteen_stages_take_less_than_50_ms() -> None:
    draw = random.Random(0)
    machines = [a_machine(number, decode_layer_seconds=draw.uniform(0.001, 0.01)) for number in range(16)]
    shape = a_shape((100,) * 100)
    fastest_seconds = min(_seconds_of(shape, machines) for _ in range(5))
    assert fastest_seconds < 0.05


def _seconds_of(shape: ModelShape, machines: list[MachineReport]) -> float:
    start = time.perf_counter()
    cut(shape, machines)
    return time.perf_counter() - start
