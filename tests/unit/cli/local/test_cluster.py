from __future__ import annotations

from pathlib import Path

import pytest

from noodle.config.environment import command_config
from noodle.errors import ConfigurationError
from services.cli.local.cluster import ClusterSpec, children_environment, resolve, service_specs
from services.cli.local.run_folder import RunFolder


def resolved(
    environment: dict[str, str] | None = None,
    *,
    stages: int | None = None,
    model: str | None = None,
    split: str | None = None,
) -> ClusterSpec:
    environment = environment or {}
    return resolve(command_config(environment), environment, stages, model, split)


def test_two_stages_of_the_default_model_by_default() -> None:
    wanted = resolved()
    assert (wanted.stage_count, wanted.model, wanted.split) == (2, "SmolLM2-135M-Instruct", "")
    assert wanted.stage_ports == (8081, 8082)


def test_options_go_before_variables() -> None:
    environment = {"NOODLE_STAGES": "3", "NOODLE_MODEL": "gpt2", "NOODLE_SPLIT": "4,4,4"}
    assert resolved(environment).split == "4,4,4"
    wanted = resolved(environment, stages=2, model="other", split="10, 2")
    assert (wanted.stage_count, wanted.model, wanted.split) == (2, "other", "10,2")


def test_a_split_says_how_many_stages_there_are() -> None:
    assert resolved(split="4,4,4").stage_count == 3


@pytest.mark.parametrize("split", ["10,", "a,b", "0,12", "-1,13", ","])
def test_an_invalid_split_is_refused(split: str) -> None:
    with pytest.raises(ConfigurationError):
        resolved(split=split)


def test_a_split_for_another_number_of_stages_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="for 2 stages, but 3 are requested"):
        resolved(stages=3, split="10,2")


def test_two_services_on_one_port_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="8082 is assigned to the planner and to stage 1"):
        resolved({"NOODLE_PLANNER_PORT": "8082"})


def test_ports_beyond_the_last_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="stage 1 would listen on port 65536"):
        resolved({"NOODLE_FIRST_STAGE_PORT": "65535"})


def test_a_variable_that_up_would_ignore_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="NOODLE_STAGE_BIND is set"):
        resolved({"NOODLE_STAGE_BIND": "0.0.0.0:9000"})


def test_the_cores_are_divided_among_the_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.cli.local.cluster.usable_cores", lambda: 8)
    assert threads_of(resolved(stages=3)) == ["2", "2", "2"]
    assert threads_of(resolved(stages=9)) == ["1"] * 9
    assert threads_of(resolved({"NOODLE_THREADS": "5"}, stages=3)) == ["5", "5", "5"]


def threads_of(spec: ClusterSpec) -> list[str]:
    specs = service_specs(spec, {}, Path("/model"))
    return [each.environment["NOODLE_THREADS"] for each in specs if each.name.startswith("stage")]


def test_children_get_secrets_by_file_only(tmp_path: Path) -> None:
    environment = {"NOODLE_CLUSTER_TOKEN": "a-token-from-the-operator", "PATH": "/bin", "NOODLE_STAGES": "2"}
    folder = RunFolder(tmp_path)
    given = children_environment(environment, command_config(environment), folder)
    assert "a-token-from-the-operator" not in given.values()
    assert given["NOODLE_CLUSTER_TOKEN_FILE"] == str(folder.token_path)
    assert given["PATH"] == "/bin"
