import dataclasses
from pathlib import Path

import pytest

from noodle.config.environment import command_config, coordinator_config, planner_config, read_variables, stage_config
from noodle.config.settings import CONFIGS, VARIABLES, env_example
from noodle.errors import ConfigurationError

TOKEN = {"NOODLE_CLUSTER_TOKEN": "a-long-enough-secret"}
ROOT = Path(__file__).parents[4]


def test_the_example_file_holds_every_variable_with_its_default():
    assert (ROOT / ".env.example").read_text(encoding="utf-8") == env_example()


def test_every_default_passes_its_own_check():
    assert set(read_variables({})) == {variable.name for variable in VARIABLES}


def test_each_variable_is_declared_once():
    declared = {}
    for kind in CONFIGS:
        for each in dataclasses.fields(kind):
            found = each.metadata["variable"]
            assert declared.setdefault(found.name, found) is found, found.name


def test_an_unknown_variable_stops_the_start_and_the_near_one_is_named():
    with pytest.raises(ConfigurationError) as caught:
        read_variables({"NOODLE_STAGE": "1"})
    assert "NOODLE_STAGE is not" in str(caught.value)
    assert "NOODLE_STAGES" in str(caught.value)


@pytest.mark.parametrize("retired", ["near-lossless", "small"])
def test_a_quality_of_an_older_noodle_is_refused_with_what_to_set_instead(retired):
    with pytest.raises(ConfigurationError) as caught:
        read_variables({"NOODLE_QUALITY": retired})
    assert "stored, exact" in str(caught.value)
    assert "NOODLE_WEIGHTS" in str(caught.value)


def test_a_variable_that_an_older_env_file_still_sets_is_ignored_with_a_line(caplog):
    values = read_variables({"NOODLE_STAY_AWAKE": "off"})
    assert "NOODLE_STAY_AWAKE" not in values
    assert "NOODLE_STAY_AWAKE has no effect any more" in caplog.text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NOODLE_STAGES", "0"),
        ("NOODLE_CONTEXT_LENGTH", "1"),
        ("NOODLE_CONTEXT_LENGTH", "-1"),
        ("NOODLE_CONTEXT_LENGTH", "many"),
        ("NOODLE_STAGES", "two"),
        ("NOODLE_SPLIT", "10,0"),
        ("NOODLE_SPLIT", "10;2"),
        ("NOODLE_SPLIT", "ten,2"),
        ("NOODLE_STAGE_BIND", "8081"),
        ("NOODLE_STAGE_BIND", "127.0.0.1:99999"),
        ("NOODLE_ADVERTISE_URL", "192.168.1.102"),
        ("NOODLE_DTYPE", "int8"),
        ("NOODLE_RECOVERY_SECONDS", "nan"),
        ("NOODLE_RECOVERY_SECONDS", "soon"),
        ("NOODLE_RECOVERY_SECONDS", "-1"),
        ("NOODLE_MAX_BODY_BYTES", "1e9"),
    ],
)
def test_a_value_that_means_nothing_stops_the_start_and_is_named(name, value):
    with pytest.raises(ConfigurationError, match=name):
        read_variables({name: value})


@pytest.mark.parametrize(
    "others", [{"NOODLE_QUALITY": "exact"}, {"NOODLE_EXECUTOR": "transformers"}, {"NOODLE_DTYPE": "bfloat16"}]
)
def test_a_format_of_kv_rows_that_another_setting_contradicts_stops_the_start(others):
    assert stage_config({**TOKEN, "NOODLE_KV": "q8_0"}).kv_format == "q8_0"
    with pytest.raises(ConfigurationError, match="NOODLE_KV"):
        read_variables({"NOODLE_KV": "q8_0", **others})
    with pytest.raises(ConfigurationError, match="NOODLE_KV"):
        read_variables({"NOODLE_KV": "q4_0"})


def test_a_service_without_a_cluster_token_does_not_start():
    for read in (coordinator_config, planner_config, stage_config):
        with pytest.raises(ConfigurationError, match="NOODLE_CLUSTER_TOKEN"):
            read({})
        with pytest.raises(ConfigurationError, match="shorter"):
            read({"NOODLE_CLUSTER_TOKEN": "short"})


def test_a_secret_comes_from_its_file_and_not_from_both(tmp_path):
    file = tmp_path / "token"
    file.write_text("the-secret-of-the-cluster\n", encoding="utf-8")
    assert stage_config({"NOODLE_CLUSTER_TOKEN_FILE": str(file)}).cluster_token == "the-secret-of-the-cluster"
    with pytest.raises(ConfigurationError, match="both"):
        stage_config({**TOKEN, "NOODLE_CLUSTER_TOKEN_FILE": str(file)})
    with pytest.raises(ConfigurationError, match="cannot be read"):
        stage_config({"NOODLE_CLUSTER_TOKEN_FILE": str(tmp_path / "none")})


def test_a_coordinator_that_others_can_reach_needs_a_key():
    open_door = {**TOKEN, "NOODLE_COORDINATOR_BIND": "0.0.0.0:8080"}
    with pytest.raises(ConfigurationError, match="without a key"):
        coordinator_config(open_door)
    assert [each.key for each in coordinator_config({**open_door, "NOODLE_API_KEY": "k"}).api_keys] == ["k"]
    assert coordinator_config(TOKEN).api_keys == ()


def test_several_keys_are_listed_with_commas_or_lines_between_and_may_have_names(tmp_path):
    keys = coordinator_config({**TOKEN, "NOODLE_API_KEY": "alice:one, two,bob:with:colon"}).api_keys
    assert [(each.name, each.key) for each in keys] == [("alice", "one"), ("key-2", "two"), ("bob", "with:colon")]
    file = tmp_path / "keys"
    file.write_text("alice:one\n\nbob:two\n", encoding="utf-8")
    from_file = {**TOKEN, "NOODLE_API_KEY_FILE": str(file)}
    assert [each.name for each in coordinator_config(from_file).api_keys] == ["alice", "bob"]
    assert command_config(from_file).api_key == "one"


@pytest.mark.parametrize("text", ["a:x,a:y", "a:x,b:x", "x,x", "cluster:x", "a b:x", "a:", ":x", "tab\tkey", "a:é"])
def test_keys_that_can_not_be_told_apart_or_sent_stop_the_start_without_being_shown(text):
    with pytest.raises(ConfigurationError, match="NOODLE_API_KEY") as caught:
        coordinator_config({**TOKEN, "NOODLE_API_KEY": text})
    assert text not in str(caught.value)


def test_a_key_is_not_shown_with_its_name():
    (key,) = coordinator_config({**TOKEN, "NOODLE_API_KEY": "alice:secret"}).api_keys
    assert "secret" not in repr(key)


@pytest.mark.parametrize("text", ["example.com", "http://a.b/path", "ftp://a.b", "http://", "*,nonsense"])
def test_origins_are_checked(text):
    with pytest.raises(ConfigurationError, match="NOODLE_CORS_ORIGINS"):
        coordinator_config({**TOKEN, "NOODLE_CORS_ORIGINS": text})


def test_origins_are_a_list():
    text = "http://192.168.1.5:3000, https://a.example"
    origins = coordinator_config({**TOKEN, "NOODLE_CORS_ORIGINS": text}).cors_origins
    assert origins == ("http://192.168.1.5:3000", "https://a.example")


def test_a_stage_on_all_addresses_must_say_where_it_is_reached():
    with pytest.raises(ConfigurationError, match="NOODLE_ADVERTISE_URL"):
        stage_config({**TOKEN, "NOODLE_STAGE_BIND": "0.0.0.0:8081"})
    assert stage_config(TOKEN).advertise_url == "http://127.0.0.1:8081"
    with pytest.raises(ConfigurationError, match="cannot connect to"):
        stage_config({**TOKEN, "NOODLE_ADVERTISE_URL": "http://0.0.0.0:8081"})


def test_a_split_for_another_number_of_stages_is_refused():
    with pytest.raises(ConfigurationError, match="names 3 stages"):
        planner_config({**TOKEN, "NOODLE_SPLIT": "1,2,3"})
