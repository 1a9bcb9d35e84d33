"""What noodle doctor makes of facts about this machine: Docker, card, memory, disk, ports, addresses, firewall."""

import errno
import socket
from contextlib import closing

import pytest

from noodle.config.addresses import why_only_local
from services.cli.doctor.capacity import MemoryFacts, Need, check_memory, need_of
from services.cli.doctor.docker import DockerFacts, check_docker, gather_docker, version_of
from services.cli.doctor.firewall import FirewallFacts, check_firewall, ports_in
from services.cli.doctor.gpu import Card, GpuFacts, check_gpu, parse_cards, runs_on
from services.cli.doctor.links import check_advertised, check_names, unresolved
from services.cli.doctor.ports import Port, PortFacts, check_port, gather_port
from services.cli.project import firewall as firewall_rules
from services.cli.project.firewall import Opening
from services.cli.project.programs import Ran

GOOD = DockerFacts(True, engine="27.1.2", compose="2.29.1", os_type="linux", memory_bytes=16 << 30)
PASCAL = Card("NVIDIA GeForce GTX 1050", "580.105.08", 6.1, "4096 MiB")
CU126 = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")
CU130 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "compute_120")


def statuses(results):
    return [result.status for result in results]


def only(results, check):
    (found,) = [result for result in results if result.check == check]
    return found


def answering(**by_last_word):
    """A stand-in for running programs: what each says, by the word that tells it apart."""

    def run(arguments, _seconds):
        return next((ran for word, ran in by_last_word.items() if word in arguments), Ran())

    return run


# Docker


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        (
            "permission denied while trying to connect to the Docker daemon socket at unix:///var/run/docker.sock",
            "permission",
        ),
        (
            "Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is the docker daemon running?",
            "stopped",
        ),
        ("error during connect: open //./pipe/dockerDesktopLinuxEngine: The system cannot find the file", "stopped"),
        ("open //./pipe/docker_engine: Access is denied.", "permission"),
        ("something nobody has seen before", "other"),
    ],
)
def test_why_the_engine_does_not_answer_is_recognised(said, problem):
    refused = Ran(1, '{"ServerVersion":""}', said)
    run = answering(info=refused, version=Ran(0, "2.29.1"))
    facts = gather_docker(run)
    assert (facts.problem, facts.compose) == (problem, "2.29.1")
    finding = only(check_docker(facts, "m", "linux", is_needed=True), "docker")
    assert finding.status == "error"
    assert ("usermod -aG docker" in finding.cure) == (problem == "permission")


def test_an_engine_that_is_late_is_not_waited_for():
    facts = gather_docker(answering(info=Ran(124, is_late=True), version=Ran(0, "2.29.1")))
    assert facts.problem == "late"


@pytest.mark.parametrize(
    ("facts", "system", "says", "cure"),
    [
        (DockerFacts(is_installed=False), "linux", "not installed", "get.docker.com"),
        (DockerFacts(is_installed=False), "windows", "not installed", "winget install"),
        (DockerFacts(True, "stopped", "x"), "linux", "does not answer", "systemctl"),
        (DockerFacts(True, "stopped", "x"), "windows", "does not answer", "Docker Desktop.exe"),
        (DockerFacts(True, engine="19.3.1", compose="2.29.1"), "linux", "older than 20.10", "get.docker.com"),
        (
            DockerFacts(True, engine="27.0.0", compose="2.29.1", os_type="windows"),
            "windows",
            "Windows containers",
            "-Switch",
        ),
    ],
)
def test_each_state_of_docker_has_its_cure_on_this_system(facts, system, says, cure):
    finding = only(check_docker(facts, "m", system, is_needed=True), "docker")
    assert finding.status == "error"
    assert says in finding.what
    assert cure in finding.cure
    assert finding.why


@pytest.mark.parametrize(
    ("compose", "status"), [("", "error"), ("2.19.1", "error"), ("2.20.0", "ok"), ("v2.40.3", "ok"), ("dev", "warning")]
)
def test_compose_must_be_2_20_or_later(compose, status):
    facts = DockerFacts(True, engine="27.1.2", compose=compose)
    assert only(check_docker(facts, "m", "linux", is_needed=True), "compose").status == status


@pytest.mark.parametrize("facts", [DockerFacts(is_installed=False), DockerFacts(True, engine="27.1.2", compose="")])
def test_noodle_up_needs_no_docker(facts):
    assert statuses(check_docker(facts, "m", "linux", is_needed=False)) == ["skipped"]


def test_a_debian_version_is_read():
    assert version_of("2.26.1-4") == (2, 26)
    assert version_of("20.10.24+dfsg1") == (20, 10)
    assert version_of("unknown") == ()


# card


def test_nvidia_smi_is_read():
    assert parse_cards("NVIDIA GeForce GTX 1050, 580.105.08, 6.1, 4096 MiB\n") == (PASCAL,)
    assert parse_cards("NVIDIA GeForce GTX 1050, 470.1, [N/A], 4096 MiB\n")[0].capability == 0.0


@pytest.mark.parametrize(
    ("driver", "capability", "status"),
    [
        ("580.105.08", 6.1, "ok"),
        ("525.60.13", 6.1, "ok"),
        ("470.256.02", 6.1, "error"),
        ("590.44.01", 6.1, "error"),
        ("590.44.01", 8.9, "ok"),
    ],
)
def test_a_pascal_card_wants_a_driver_from_525_to_580(driver, capability, status):
    facts = GpuFacts(cards=(Card("NVIDIA GeForce", driver, capability),), has_driver=True)
    assert only(check_gpu(facts, GOOD, "m", "linux", is_wanted=False), "driver").status == status


def test_a_card_that_its_driver_no_longer_names_is_a_finding():
    facts = GpuFacts(detail="No devices were found", has_driver=True, has_device=True)
    (finding,) = check_gpu(facts, GOOD, "m", "windows", is_wanted=True)
    assert finding.status == "error"
    assert "580" in finding.cure
    assert statuses(check_gpu(facts, GOOD, "m", "linux", is_wanted=False)) == ["warning"]


def test_a_machine_without_a_card_is_in_order_unless_its_set_wants_one():
    facts = GpuFacts(has_device=False)
    assert statuses(check_gpu(facts, GOOD, "m", "linux", is_wanted=False)) == ["ok"]
    assert statuses(check_gpu(facts, GOOD, "m", "linux", is_wanted=True)) == ["error"]


def test_containers_need_a_way_to_the_card():
    facts = GpuFacts(cards=(PASCAL,), has_driver=True, image="noodle-stage-gpu", architectures=CU126)
    finding = only(check_gpu(facts, GOOD, "m", "linux", is_wanted=True), "gpu runtime")
    assert finding.status == "error"
    assert "nvidia-ctk" in finding.cure
    with_runtime = DockerFacts(True, engine="27", compose="2.29", runtimes=("runc", "nvidia"))
    assert statuses(check_gpu(facts, with_runtime, "m", "linux", is_wanted=True)) == ["ok", "ok", "ok"]
    assert only(check_gpu(facts, None, "m", "linux", is_wanted=True), "gpu runtime").status == "skipped"


def test_an_image_without_kernels_for_the_card_is_a_finding():
    facts = GpuFacts(cards=(PASCAL,), has_driver=True, image="noodle-stage-gpu", architectures=CU130)
    finding = only(check_gpu(facts, GOOD, "m", "linux", is_wanted=True), "kernels")
    assert finding.status == "error"
    assert "cu126" in finding.cure


def test_an_image_that_is_not_built_is_skipped_with_the_reason():
    facts = GpuFacts(cards=(PASCAL,), has_driver=True, image_detail="the image is not built yet")
    finding = only(check_gpu(facts, GOOD, "m", "linux", is_wanted=True), "kernels")
    assert (finding.status, finding.what) == ("skipped", "the image is not built yet")


def test_kernels_run_on_their_own_generation_and_portable_code_on_later_ones():
    assert runs_on(6.1, CU126)  # sm_60 does on 6.1
    assert not runs_on(6.1, CU130)
    assert not runs_on(6.0, ("sm_61",))
    assert runs_on(12.1, CU130)
    assert not runs_on(6.1, ("nonsense",))


# memory and disk


def memory(**changes):
    facts = {"total_bytes": 16 << 30, "available_bytes": 12 << 30, "disk_path": "/d", "disk_free_bytes": 100 << 30}
    return MemoryFacts(**{**facts, **changes})


def test_memory_that_the_plan_does_not_find_is_an_error():
    need = Need(cpu_bytes=20 << 30, weight_bytes=1 << 30, is_loaded=False)
    finding = only(check_memory(memory(), GOOD, need, "m", "linux", why_no_need=""), "memory")
    assert finding.status == "error"
    assert "21.5 GB" in finding.what
    assert (
        only(
            check_memory(memory(), GOOD, Need(20 << 30, 0, is_loaded=True), "m", "linux", why_no_need=""), "memory"
        ).status
        == "ok"
    )


def test_without_a_plan_memory_is_skipped_with_the_reason():
    finding = only(check_memory(memory(), GOOD, None, "m", "linux", why_no_need="there is no plan yet"), "memory")
    assert finding.status == "skipped"
    assert "there is no plan yet" in finding.what
    assert (
        only(check_memory(memory(available_bytes=1 << 28), GOOD, None, "m", "linux", why_no_need=""), "memory").status
        == "warning"
    )


def test_wsl_that_gives_docker_half_of_the_memory_is_reported_with_the_file_to_change():
    desktop = DockerFacts(True, engine="27", compose="2.29", is_desktop=True, memory_bytes=7 << 30)
    finding = only(check_memory(memory(), desktop, None, "m", "windows", why_no_need=""), "memory cap")
    assert finding.status == "warning"
    assert ".wslconfig" in finding.cure
    assert "memory=13GB" in finding.cure
    needed = Need(cpu_bytes=8 << 30, weight_bytes=0, is_loaded=False)
    assert only(check_memory(memory(), desktop, needed, "m", "windows", why_no_need=""), "memory cap").status == "error"
    enough = Need(cpu_bytes=4 << 30, weight_bytes=0, is_loaded=False)
    assert only(check_memory(memory(), desktop, enough, "m", "windows", why_no_need=""), "memory cap").status == "ok"


@pytest.mark.parametrize(
    ("free_bytes", "has_images", "status"),
    [
        (20 << 30, False, "ok"),
        (5 << 30, False, "warning"),
        (5 << 30, True, "ok"),
        (1 << 29, True, "error"),
        (None, None, "skipped"),
    ],
)
def test_disk_must_hold_images_that_are_not_built_yet(free_bytes, has_images, status):
    facts = memory(disk_free_bytes=free_bytes, has_images=has_images)
    assert only(check_memory(facts, GOOD, None, "m", "linux", why_no_need=""), "disk").status == status


def test_what_a_plan_puts_on_a_machine_is_the_sum_over_its_stages():
    stages = [
        {"node_id": "a", "stage_id": 0, "device_type": "cuda", "weight_bytes": 10, "kv_bytes": 1},
        {"node_id": "a", "stage_id": 1, "device_type": "cpu", "weight_bytes": 20, "kv_bytes": 2},
        {"node_id": "b", "stage_id": 2, "device_type": "cpu", "weight_bytes": 40, "kv_bytes": 4},
    ]
    assert need_of({"stages": stages}, "a", {0: "ready", 1: "loading"}) == Need(22, 30, is_loaded=False)
    assert need_of({"stages": stages}, "b", {2: "ready"}) == Need(44, 40, is_loaded=True)
    assert need_of({"stages": stages}, "c", {}) is None


# ports


def coordinator_port(address="127.0.0.1", number=8080):
    return Port("coordinator", "NOODLE_COORDINATOR_PORT", address, number)


def gathered(port, run=None, own_ports=()):
    return gather_port(run or answering(), coordinator_port("127.0.0.1", port), own_ports)


def test_a_free_port_is_free_and_a_taken_one_names_its_holder():
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert (
            gathered(port, answering(ss=Ran(0, 'LISTEN 0 5 users:(("nginx",pid=33,fd=3))'))).program
            == "nginx (process 33)"
        )
        assert gathered(port, own_ports=(port,)).holder == "noodle"
        published = Ran(0, f"noodle\tnoodle-coordinator-1\t127.0.0.1:{port}->8080/tcp\n")
        assert gathered(port, answering(ps=published)).holder == "noodle"
        other = Ran(0, f"web\tweb-1\t0.0.0.0:{port}->80/tcp\n")
        facts = gathered(port, answering(ps=other))
        assert (facts.holder, facts.program) == ("other", "the container web-1")
    assert gathered(port).holder == "nobody"


def test_an_address_that_is_not_this_machines_is_a_finding():
    facts = gather_port(answering(), coordinator_port("192.0.2.1"), ())
    assert facts.holder == "no_address"
    finding = check_port(facts, "m", "windows")
    assert (finding.status, finding.check) == ("error", "address")
    assert "ipconfig" in finding.cure


@pytest.mark.parametrize(
    ("system", "looks"), [("linux", "ss -ltnp"), ("windows", "Get-NetTCPConnection"), ("other", "lsof")]
)
def test_a_port_of_another_program_is_an_error_that_says_how_to_find_it(system, looks):
    facts = PortFacts(coordinator_port(), "other", "nginx")
    finding = check_port(facts, "m", system)
    assert finding.status == "error"
    assert looks in finding.cure
    assert "NOODLE_COORDINATOR_PORT" in finding.cure


# names and addresses


@pytest.mark.parametrize(
    "host",
    ["localhost", "127.0.0.1", "127.9.9.9", "0.0.0.0", "::", "::1", "172.17.0.2", "stage-1", "host.docker.internal"],
)
def test_hosts_that_point_at_their_reader(host):
    assert why_only_local(host)


@pytest.mark.parametrize("host", ["192.168.1.101", "10.0.0.2", "172.18.0.2", "laptop.lan", "fe80::1"])
def test_hosts_that_others_may_find(host):
    assert not why_only_local(host)


def test_an_advertised_url_of_itself_is_an_error_that_says_what_to_set():
    finding = check_advertised("NOODLE_ADVERTISE_URL", "http://0.0.0.0:8081", "NOODLE_ADVERTISE_URL", "m", "linux")
    assert finding.status == "error"
    assert "ip -4" in finding.cure
    assert check_advertised("x", "192.168.1.101", "x", "m", "linux").status == "ok"
    assert check_advertised("x", "", "x", "m", "linux").status == "error"


def test_a_name_that_does_not_resolve_is_a_finding_for_each_system():
    def resolve(host):
        raise socket.gaierror(errno.ENOENT, "unknown")

    assert unresolved(["pc.lan", "pc.lan"], resolve) == ["pc.lan"]
    (finding,) = check_names(["192.168.1.101", "pc.lan"], ["pc.lan"], "m", "windows")
    assert finding.status == "error"
    assert "Resolve-DnsName pc.lan" in finding.cure
    assert statuses(check_names(["192.168.1.101"], [], "m", "linux")) == ["ok"]


# firewall

OPENINGS = [Opening("coordinator", 8080, ("192.168.1.102",)), Opening("stage-0", 8081, ("192.168.1.102",))]
EXPECTED = firewall_rules.linux_script(OPENINGS, "192.168.1.101")
RULES = tuple(line for line in EXPECTED.splitlines() if line.startswith("-A"))


def test_open_ports_are_a_warning_with_the_command_that_closes_them():
    facts = FirewallFacts(expected_script=EXPECTED, rules=(), is_called=False)
    (finding,) = check_firewall(facts, "m", "linux")
    assert finding.status == "warning"
    assert "firewall.sh --apply" in finding.cure
    assert statuses(check_firewall(FirewallFacts(expected_script=EXPECTED, unread="not root"), "m", "linux")) == [
        "warning"
    ]


def test_rules_that_stand_are_in_order_unless_a_port_is_missing():
    assert statuses(
        check_firewall(FirewallFacts(expected_script=EXPECTED, rules=RULES, is_called=True), "m", "linux")
    ) == ["ok"]
    assert statuses(
        check_firewall(FirewallFacts(expected_script=EXPECTED, rules=RULES, is_called=False), "m", "linux")
    ) == ["warning"]
    (finding,) = check_firewall(FirewallFacts(expected_script=EXPECTED, rules=RULES[:2], is_called=True), "m", "linux")
    assert finding.status == "warning"
    assert "8081" in finding.what


def test_rules_that_only_root_may_read_are_skipped_with_the_reason():
    (finding,) = check_firewall(
        FirewallFacts(expected_script=EXPECTED, script=EXPECTED, unread="Permission denied"), "m", "linux"
    )
    assert finding.status == "skipped"
    assert "sudo bash" in finding.what


def test_ports_are_read_from_rules_as_iptables_prints_them():
    printed = "-A NOODLE -p tcp -m conntrack --ctorigdst 192.168.1.101 --ctorigdstport 8080 --ctdir ORIGINAL -j DROP"
    assert ports_in([printed, "-N NOODLE", printed.replace("DROP", "RETURN")]) == {8080}


@pytest.mark.parametrize(
    ("windows", "expected"),
    [
        (
            {"profiles": ["Private"], "networks": ["Private"], "rules": ["noodle 8081"], "docker": ["192.168.1.101"]},
            ["ok"],
        ),
        (
            {"profiles": ["Private"], "networks": ["Public"], "rules": ["noodle 8081"], "docker": ["192.168.1.101"]},
            ["warning", "ok"],
        ),
        ({"profiles": [], "networks": ["Private"], "rules": [], "docker": []}, ["warning"]),
        ({"profiles": ["Private"], "networks": ["Private"], "rules": ["noodle 8081"], "docker": ["Any"]}, ["warning"]),
    ],
)
def test_the_windows_firewall_is_judged_by_profiles_and_rules(windows, expected):
    assert (
        statuses(check_firewall(FirewallFacts(expected_script=EXPECTED, windows=windows), "m", "windows")) == expected
    )


def test_a_machine_that_is_alone_has_nothing_to_close():
    assert statuses(check_firewall(FirewallFacts(nothing_to_close="alone"), "m", "linux")) == ["ok"]
