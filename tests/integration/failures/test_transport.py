"""Direct, queued and mixed transport give the same tokens while connections are cut and Valkey is killed or full."""

import contextlib
import threading
import time

import pytest
import redis

from noodle.cluster.plan import PlannerState
from noodle.cluster.valkey import RESULTS_STREAM, hop_stream
from tests.support.processes.cluster import request, running_cluster, wait_until
from tests.support.processes.stage_rig import running_coordinator, running_stages

pytestmark = pytest.mark.timeout(300)
TRANSPORTS = ("direct", "queue", "auto")
PROMPTS = ["a fixed prompt", "another one", "x" * 120]
NEW_TOKENS = 100
RECOVERY_SECONDS = 10


@contextlib.contextmanager
def pipeline(folder, model, transport, **variables):
    """Run two stages behind relays and a coordinator; everything sent to a stage passes its relay."""
    with (
        running_stages(folder, model, (3, 3), relayed=(0, 1), NOODLE_TRANSPORT=transport, **variables) as rig,
        running_coordinator(rig, folder, NOODLE_RECOVERY_SECONDS=str(RECOVERY_SECONDS)) as services,
    ):
        if transport == "auto":  # ready by the queue alone, perhaps before the hop is open
            wait_for_the_direct_way(services)
        yield services


def wait_for_the_direct_way(services):
    wait_until(lambda: not services.stage_states()[0]["link"]["by_queue"], 15, "the direct way stands")


@pytest.fixture(scope="module")
def direct(tiny_folder, tmp_path_factory):
    with pipeline(tmp_path_factory.mktemp("direct"), tiny_folder, "direct") as services:
        yield services


@pytest.fixture(scope="module")
def queue(tiny_folder, tmp_path_factory):
    with pipeline(tmp_path_factory.mktemp("queue"), tiny_folder, "queue") as services:
        yield services


@pytest.fixture(scope="module")
def auto(tiny_folder, tmp_path_factory):
    with pipeline(tmp_path_factory.mktemp("auto"), tiny_folder, "auto") as services:
        yield services


@pytest.fixture(params=TRANSPORTS)
def services(request):
    return request.getfixturevalue(request.param)


def ids_of(services, prompt, new_tokens=NEW_TOKENS):
    answer = services.generate(prompt, max_new_tokens=new_tokens, ignore_eos=True, details=True)
    return [token["id"] for token in answer["details"]["tokens"]]


@pytest.fixture(scope="module")
def expected(direct):
    """The tokens of each prompt over undisturbed connections."""
    return [ids_of(direct, prompt) for prompt in PROMPTS]


def at_once(services, prompts=PROMPTS):
    """Return the tokens of all prompts, requested at the same time."""
    found = [None] * len(prompts)

    def ask(index):
        found[index] = ids_of(services, prompts[index])

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "a request hangs"
    return found


def steps_by(services, transport):
    """Return the steps that the coordinator and stage 0 have sent over this transport."""
    name = f'noodle_hop_steps_total{{transport="{transport}"}}'
    return [services.metric(port, name) for port in (services.port, services.stage_ports[0])]


def test_every_way_gives_the_same_tokens_and_leaves_nothing(services, expected):
    assert at_once(services) == expected
    wait_until(lambda: services.kv_bytes_held() == 0, 15, "no KV rows are left")
    assert [state["outbox_bytes"] for state in services.stage_states()] == [0, 0]


def test_each_way_is_counted_and_only_the_configured_one_is_taken(direct, queue, auto, expected):
    for services, way, other in ((direct, "direct", "queue"), (queue, "queue", "direct"), (auto, "direct", "queue")):
        before = steps_by(services, way)
        ids_of(services, PROMPTS[0], 5)
        assert [after - count for after, count in zip(steps_by(services, way), before, strict=True)] == [5, 5]
        if services is not auto:
            assert steps_by(services, other) == [0, 0]


def test_connections_that_are_cut_all_the_time_change_no_token(auto, expected):
    relays = auto.rig.relays
    with relays[0].cutting(0.5), relays[1].cutting(0.5):
        for _ in range(3):
            assert at_once(auto) == expected
    assert min(steps_by(auto, "queue")) > 0
    assert min(steps_by(auto, "direct")) > 0


@pytest.mark.parametrize("stages", [(0,), (1,), (0, 1)])
def test_while_no_connection_can_be_made_everything_goes_by_the_queue(auto, expected, stages):
    relays = [auto.rig.relays[stage] for stage in stages]
    for relay in relays:
        relay.stop()
    try:
        if 0 in stages:
            relays[0].start()  # references are fetched through it; hops cannot open while it cuts
            with relays[0].cutting(0.3):
                assert at_once(auto) == expected
        else:
            assert at_once(auto) == expected
            links = [state["link"] for state in auto.stage_states()]
            assert links[0]["by_queue"]
            assert links[0]["detail"] == "by the queue"
    finally:
        for relay in relays:
            if not relay.port or relay._listener is None:
                relay.start()
    wait_for_the_direct_way(auto)
    before = steps_by(auto, "direct")
    assert at_once(auto) == expected
    assert all(after > count for after, count in zip(steps_by(auto, "direct"), before, strict=True))


def test_by_the_queue_the_last_stage_needs_no_door(queue, expected):
    queue.rig.relays[1].stop()
    try:
        assert at_once(queue) == expected
    finally:
        queue.rig.relays[1].start()
    assert queue.rig.relays[1].connections == 0


def test_by_the_queue_no_hop_and_no_results_are_opened(queue):
    for method, path in (("POST", "/hop"), ("GET", "/results")):
        status, answer = request(
            queue.stage_ports[1], method, path, token=queue.token, X_Noodle_Plan_Version="1",
            X_Noodle_Coordinator_Epoch="9",
        )  # fmt: skip
        assert status == 409
        assert "NOODLE_TRANSPORT" in answer["error"]["message"]


@pytest.mark.parametrize("stream", [hop_stream(0), hop_stream(1), RESULTS_STREAM])
def test_junk_in_a_stream_changes_nothing(queue, expected, stream):
    for junk in (b"", b"\xc1", b"\x00" * 100_000, b"\x81\xa4type\xa5alive"):
        queue.rig.work_queue.append(stream, junk)
    assert at_once(queue) == expected


@contextlib.contextmanager
def echoing(work_queue, stream):
    """Append each entry of a stream twice more: once soon, and once late in the wrong order."""
    over = threading.Event()
    echoed = []

    def echo():
        after = work_queue.newest(stream)
        seen, late = set(), []
        while not over.is_set():
            for name, entry in work_queue.read(stream, after, 0.05):
                after = name
                if entry not in seen:
                    seen.add(entry)
                    late.append(entry)
                    echoed.append(entry)
                    work_queue.append(stream, entry)
            if len(late) >= 8:
                for entry in reversed(late):
                    work_queue.append(stream, entry)
                late.clear()

    thread = threading.Thread(target=echo)
    thread.start()
    try:
        yield echoed
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize("stream", [hop_stream(0), hop_stream(1), RESULTS_STREAM])
def test_steps_and_results_that_come_again_late_and_out_of_order_change_no_token(queue, expected, stream):
    with echoing(queue.rig.work_queue, stream) as echoed:
        for _ in range(2):
            assert at_once(queue) == expected
    assert len(echoed) > 20
    wait_until(lambda: queue.kv_bytes_held() == 0, 15, "only what is kept on purpose is left")
    assert at_once(queue) == expected


def during_a_stream(services, act, prompt=PROMPTS[0]):
    """Call `act` in the middle of a request; return its status and answer."""
    answers = []
    parameters = {"max_new_tokens": NEW_TOKENS * 2, "ignore_eos": True, "details": True}

    def ask():
        answers.append(services.post("/generate", {"inputs": prompt, "parameters": parameters}))

    thread = threading.Thread(target=ask)
    thread.start()
    wait_until(lambda: services.kv_bytes_held() > 0, 10, "the request runs")
    act()
    thread.join(60)
    assert not thread.is_alive(), "the request hangs"
    return answers[0]


def test_a_valkey_that_is_killed_and_started_again_ends_no_stream(services, expected):
    valkey = services.rig.valkey

    def kill_and_start():
        valkey.kill()
        time.sleep(0.5)  # the duration of the outage
        valkey.start()

    status, answer = during_a_stream(services, kill_and_start)
    assert status == 200, answer
    assert [token["id"] for token in answer["details"]["tokens"]][:NEW_TOKENS] == expected[0]
    wait_until(services.is_ready, 30, "it is ready")
    wait_until(lambda: services.post("/generate", {"inputs": "a"})[0] == 200, 30, "new requests are taken")


def memory_of(services, bytes_):
    valkey = services.rig.valkey
    client = redis.Redis(port=valkey.port, password=valkey.password)
    client.config_set("maxmemory", bytes_)
    client.close()


def test_while_valkey_is_full_running_requests_go_on_and_new_ones_get_503(auto, expected):
    refused = []

    def fill():
        memory_of(auto, 1)
        refused.append(auto.post("/generate", {"inputs": "a"}))

    try:
        status, answer = during_a_stream(auto, fill)
    finally:
        memory_of(auto, 256 << 20)
    assert status == 200, answer
    assert [token["id"] for token in answer["details"]["tokens"]][:NEW_TOKENS] == expected[0]
    assert refused[0][0] == 503
    assert "maxmemory" in refused[0][1]["error"]["message"]
    wait_until(lambda: auto.post("/generate", {"inputs": "a"})[0] == 200, 30, "new requests are taken")


def test_by_the_queue_a_full_valkey_is_waited_for_and_then_named(queue, expected):
    def fill_for_a_while():
        memory_of(queue, 1)
        time.sleep(1.5)  # the time it is full
        memory_of(queue, 256 << 20)

    try:
        status, answer = during_a_stream(queue, fill_for_a_while)
        assert status == 200, answer
        assert [token["id"] for token in answer["details"]["tokens"]][:NEW_TOKENS] == expected[0]
        wait_until(queue.is_ready, 30, "it is ready")
        started = time.monotonic()
        status, answer = during_a_stream(queue, lambda: memory_of(queue, 1))
        assert status == 500
        assert "maxmemory" in answer["error"]["message"]
        assert time.monotonic() - started < RECOVERY_SECONDS + 10
    finally:
        memory_of(queue, 256 << 20)
    wait_until(queue.is_ready, 30, "it is ready again")


def test_large_steps_go_by_reference_and_leave_nothing(tmp_path, wide_folder):
    with pipeline(tmp_path, wide_folder, "auto") as services:
        long_prompt = list(range(3, 250)) * 4
        small = ids_of(services, long_prompt[:50], 8)
        assert steps_by(services, "queue") == [0, 0]
        first = ids_of(services, long_prompt, 8)
        into_first, into_second = steps_by(services, "queue")
        assert into_first == 0
        assert into_second > 0  # chunks of 64 tokens and more
        services.rig.valkey.kill()
        assert services.post("/generate", {"inputs": long_prompt})[0] == 503
        services.rig.valkey.start()
        wait_until(lambda: services.post("/generate", {"inputs": "a"})[0] == 200, 30, "requests are taken")
        assert ids_of(services, long_prompt, 8) == first
        assert ids_of(services, long_prompt[:50], 8) == small
        assert [state["outbox_bytes"] for state in services.stage_states()] == [0, 0]


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory):
    """A model with large prompt chunks: 4,096 hidden states a token that are cheap to compute."""
    from tests.support.models.tiny_model import make_tiny_model

    folder = tmp_path_factory.mktemp("wide") / "wide"
    make_tiny_model(
        folder, "llama", tokenizer=True, vocab_size=300, hidden_size=4096, head_dim=16, intermediate_size=64,
        num_hidden_layers=6, max_position_embeddings=2048,
    )  # fmt: skip
    return folder


def test_a_stage_that_disagrees_about_the_way_is_named(tiny_folder, tmp_path):
    with (
        running_stages(tmp_path, tiny_folder, (6,), NOODLE_TRANSPORT="direct") as rig,
        running_coordinator(rig, tmp_path, until_ready=False, NOODLE_TRANSPORT="queue") as services,
    ):

        def said():
            rig.work_queue.put_planner_state(PlannerState("planned", "", 1))  # a rig has no planner
            with contextlib.suppress(OSError):
                status, answer = services.post("/generate", {"inputs": "a"})
                return status == 503 and "stage 0 on test has direct" in answer["error"]["message"]

        wait_until(said, 60, "the disagreement is named")
        assert "queue" in services.post("/generate", {"inputs": "a"})[1]["error"]["message"]


@pytest.mark.full  # tests/integration/operator/test_up_fakes.py has a sample of it
def test_noodle_up_passes_the_transport_on(tiny_folder, tmp_path):
    with running_cluster(tmp_path / "state", tiny_folder, 2, NOODLE_TRANSPORT="queue") as cluster:
        cluster.generate("a", max_new_tokens=3)
        assert [state["transport"] for state in cluster.stage_states()] == ["queue", "queue"]
        assert min(steps_by(cluster, "queue")) > 0
