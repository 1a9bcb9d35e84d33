"""The cores that a process may use, by its affinity and by the CPU limits of control groups of both versions."""

import os

import pytest

from noodle.config.cores import cpu_limit, usable_cores


@pytest.fixture
def machine(tmp_path):
    """A function that writes the files of control groups and returns the arguments to ask for them."""

    def write(process_groups, **files):
        (tmp_path / "groups").mkdir()
        for name, content in files.items():
            path = tmp_path / "groups" / name.replace("__", "/").replace("_DOT_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content + "\n")
        (tmp_path / "cgroup").write_text(process_groups)
        return tmp_path / "cgroup", tmp_path / "groups"

    return write


def affinity_of(count, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(count)))


def test_a_containers_own_group_of_version_2_is_the_root_that_it_sees(machine):
    assert cpu_limit(*machine("0::/\n", cpu_DOT_max="150000 100000")) == 1.5


def test_the_smallest_limit_of_the_groups_around_a_process_counts(machine):
    files = {
        "a__cpu_DOT_max": "300000 100000",
        "a__b__cpu_DOT_max": "max 100000",
        "a__b__c__cpu_DOT_max": "800000 100000",
    }
    assert cpu_limit(*machine("0::/a/b/c\n", **files)) == 3.0


def test_a_limit_of_version_1_is_a_quota_and_a_period(machine):
    files = {
        "cpu,cpuacct__docker__x__cpu_DOT_cfs_quota_us": "50000",
        "cpu,cpuacct__docker__x__cpu_DOT_cfs_period_us": "25000",
    }
    asked = machine("7:memory:/docker/x\n4:cpu,cpuacct:/docker/x\n", **files)
    assert cpu_limit(*asked) == 2.0


def test_a_container_of_version_1_sees_its_group_as_the_root_although_its_path_is_the_hosts(machine):
    files = {"cpu__cpu_DOT_cfs_quota_us": "100000", "cpu__cpu_DOT_cfs_period_us": "100000"}
    assert cpu_limit(*machine("4:cpu,cpuacct:/docker/x\n", **files)) == 1.0


@pytest.mark.parametrize(
    ("process_groups", "files"),
    [
        ("0::/\n", {"cpu_DOT_max": "max 100000"}),
        ("0::/\n", {}),
        ("0::/\n", {"cpu_DOT_max": "many of them"}),
        ("0::/\n", {"cpu_DOT_max": "100000 0"}),
        ("0::/../elsewhere\n", {}),
        ("4:cpu:/\n", {"cpu__cpu_DOT_cfs_quota_us": "-1", "cpu__cpu_DOT_cfs_period_us": "100000"}),
        ("4:cpuset:/\n", {"cpuset__cpu_DOT_cfs_quota_us": "100", "cpuset__cpu_DOT_cfs_period_us": "100"}),
        ("no groups\n", {}),
    ],
)
def test_without_a_limit_that_can_be_read_there_is_none(process_groups, files, machine, monkeypatch):
    asked = machine(process_groups, **files)
    assert cpu_limit(*asked) is None
    affinity_of(6, monkeypatch)
    assert usable_cores(*asked) == 6


def test_without_control_groups_there_is_no_limit(tmp_path):
    assert cpu_limit(tmp_path / "missing", tmp_path) is None


@pytest.mark.parametrize(
    ("limit", "affinity", "cores"),
    [("250000 100000", 8, 2), ("50000 100000", 8, 1), ("800000 100000", 3, 3), ("400000 100000", 4, 4)],
)
def test_usable_cores_are_whole_ones_within_the_limit_and_the_affinity(limit, affinity, cores, machine, monkeypatch):
    affinity_of(affinity, monkeypatch)
    assert usable_cores(*machine("0::/\n", cpu_DOT_max=limit)) == cores
