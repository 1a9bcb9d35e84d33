"""The guide's test_distributed.py and benchmark loop; only addresses, key and hidden size are set.

    python test_distributed.py --coordinator http://192.168.1.101:8080 --worker http://192.168.1.102:8081 \\
        --local http://192.168.1.101:8081 --key KEY --hidden-size 768

It checks the health of coordinator and worker, a plan for the nodes, loading of both stages, activations through both
stages, tokens per second over the network compared with this machine's stage, and metrics to the coordinator.
It imports nothing but the standard library. The exit code is 0 when every check holds.
"""

import argparse
import json
import random
import sys
import time
import urllib.error
import urllib.request

WAIT_SECONDS = 120
ROUNDS = 10


class Failed(Exception):
    """A check that did not hold."""


def main():
    """Run the checks in the guide's order."""
    parser = argparse.ArgumentParser(description="checks a coordinator on A and workers on A and B")
    parser.add_argument("--coordinator", required=True)
    parser.add_argument("--worker", required=True, help="stage 1, on machine B")
    parser.add_argument("--local", required=True, help="stage 0, on this machine")
    parser.add_argument("--key", default="", help="the API key or cluster token; the cluster token for the workers")
    parser.add_argument("--hidden-size", type=int, required=True)
    options = parser.parse_args()
    checks = (check_health, check_plan, check_load, check_activations, check_errors, benchmark)
    for check in checks:
        try:
            check(options)
        except Failed as failure:
            print(f"FAILED {check.__name__}: {failure}")
            return 1
        print(f"ok {check.__name__}", flush=True)
    return 0


def check_health(options):
    """Coordinator and workers answer /health."""
    for url in (options.coordinator, options.worker, options.local):
        status, answer = call(options, "GET", f"{url}/health")
        expect(status == 200, f"{url} is not well: {status} {answer}")
        print(f"  {url}: {answer['status']}")


def check_plan(options):
    """The guide registers two nodes and asks for a plan; a bare list is accepted as well as an object."""
    nodes = [
        {"node_id": "rtx1050_laptop", "device_type": "cuda", "vram_gb": 4},
        {"node_id": "remote_cpu", "device_type": "cpu", "ram_gb": 16},
    ]
    for body in ({"available_nodes": nodes}, nodes):
        status, answer = call(options, "POST", f"{options.coordinator}/plan/generate", body)
        expect(status == 200 and answer["success"], f"no plan: {status} {answer}")
        stages = answer["plan"]["stages"]
        expect([stage["node_id"] for stage in stages] == ["rtx1050_laptop", "remote_cpu"], f"another order: {stages}")
        expect(stages[0]["end_layer"] == stages[1]["start_layer"], "the layers do not meet")
    for stage in stages:
        print(f"  {stage['node_id']}: layers {stage['start_layer']} to {stage['end_layer'] - 1}")


def check_load(options):
    """Each worker loads its own stage."""
    for stage_id, url in enumerate((options.local, options.worker)):
        status, answer = call(options, "POST", f"{url}/load_model/{stage_id}", {})
        expect(status == 200 and answer["success"], f"stage {stage_id} is not loaded: {status} {answer}")
        expect(answer["stage_id"] == stage_id, f"another stage answered: {answer}")
        print(f"  stage {stage_id}: layers {answer['layers']}")


def check_activations(options):
    """Random activations of one token pass through both stages and give a token id."""
    random.seed(0)
    activations = [[random.uniform(-1, 1) for _ in range(options.hidden_size)]]
    for stage_id in (0, 1):
        output = forward(options, f"{options.coordinator}/stage/{stage_id}/forward", "test", activations, 0, stage_id)
        activations = output.get("activations")
    expect(len(output["token_ids"]) == 1, f"no token came out: {output}")
    print(f"  token {output['token_ids'][0]}, shape {output['shape']}")


def check_errors(options):
    """Three numbers, as in the guide, are refused, and the error names the right hidden size."""
    body = {"session_id": "wrong", "activations": [0.1, 0.2, 0.3], "token_index": 0, "stage_id": 0}
    status, answer = call(options, "POST", f"{options.coordinator}/stage/0/forward", body)
    expect(status == 422 and not answer["success"], f"three numbers were taken: {status} {answer}")
    expect(str(options.hidden_size) in answer["error"]["message"], f"the right size is not named: {answer}")


def benchmark(options):
    """Compare tokens per second over both machines with this machine's stage alone, and report both."""
    activations = [[0.01] * options.hidden_size]
    over_network = measure(
        lambda token: run_through(options, "distributed", activations, token),
    )
    here = measure(lambda token: forward(options, f"{options.local}/forward", "local", activations, token, 0))
    print(f"  distributed {over_network:.1f} tokens/s, this machine's stage alone {here:.1f} tokens/s")
    body = {"node_id": "remote_cpu", "metrics": {"distributed_tokens_per_second": over_network, "local": here}}
    status, answer = call(options, "POST", f"{options.coordinator}/log_metrics", body)
    expect(status == 200 and answer["success"], f"the metrics were not taken: {status} {answer}")


def run_through(options, session_id, activations, token_index):
    """Send one token through both stages."""
    first = f"{options.coordinator}/stage/0/forward"
    output = forward(options, first, session_id, activations, token_index, 0)
    second = f"{options.coordinator}/stage/1/forward"
    return forward(options, second, session_id, output["activations"], token_index, 1)


def measure(run):
    """Return rounds per second."""
    started = time.perf_counter()
    for token_index in range(ROUNDS):
        run(token_index)
    return ROUNDS / (time.perf_counter() - started)


def forward(options, url, session_id, activations, token_index, stage_id):
    """Send the guide's body and return the answer's `output`."""
    body = {"session_id": session_id, "activations": activations, "token_index": token_index, "stage_id": stage_id}
    status, answer = call(options, "POST", url, body)
    expect(status == 200 and answer["success"], f"{url}: {status} {answer}")
    return answer["output"]


def call(options, method, url, body=None):
    """Return status and decoded answer."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {options.key}"}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=WAIT_SECONDS) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)
    except OSError as error:
        raise Failed(f"{url} cannot be reached: {error}") from error


def expect(holds, what):
    """Fail with `what` unless the condition holds."""
    if not holds:
        raise Failed(what)


if __name__ == "__main__":
    sys.exit(main())
