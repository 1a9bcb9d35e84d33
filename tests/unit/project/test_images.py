"""The files that images and containers are made from: shared layers, locks, and syntax of old engines."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from noodle import __version__
from noodle.config.settings import VARIABLES
from services.cli.project.project import Project

ROOT = Path(__file__).parents[3]
CPU, GPU = (ROOT / f"Dockerfile.{kind}" for kind in ("cpu", "gpu"))
# the targets that are run
ENDS = [(CPU, "control"), (CPU, "stage"), (CPU, "stage-transformers"), (GPU, "stage")]
COMPOSE_FILES = sorted(ROOT.glob("docker-compose*.yml"))
# CUDA libraries come from an image's wheel index, never from a lock
OF_TORCH = re.compile(r"(torch|triton|(nvidia|cuda)-(?!ml-py)[a-z0-9-]+)")


def text_of(path):
    return path.read_text(encoding="utf-8")


def locked(name):
    """Return a lock's lines by package without comments; a package may have one for each platform."""
    lines = [line for line in text_of(ROOT / name).splitlines() if line and not line.startswith("#")]
    return {(line.partition("==")[0], line) for line in lines}


def instructions(path, target):
    """Return the instructions of one target, without comments and with continued lines joined."""
    text = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", text_of(path), flags=re.MULTILINE))
    (body,) = re.findall(rf"^FROM \S+ AS {target}\n(.*?)(?=^FROM|\Z)", text, re.MULTILINE | re.DOTALL)
    return [line for line in body.splitlines() if line]


def compose(name="docker-compose.yml"):
    return yaml.safe_load(text_of(ROOT / name))


def packages(name):
    return {package for package, _ in locked(name)}


def extras():
    return tomllib.loads(text_of(ROOT / "pyproject.toml"))["project"]["optional-dependencies"]


@pytest.mark.parametrize("name", ["", "-control", "-stage", "-transformers"])
def test_each_installation_has_the_versions_that_are_tested(name):
    installed, tested = (
        {line.partition(" ;")[0] for _, line in locked(f"requirements{each}.lock")} for each in (name, "-dev")
    )
    assert installed
    assert installed <= tested


def test_what_runs_noodle_by_default_and_the_images_without_transformers_have_no_torch():
    for name in ("requirements.lock", "requirements-control.lock", "requirements-stage.lock"):
        assert not {package for package in packages(name) if OF_TORCH.fullmatch(package)}, name
        assert not packages(name) & {"transformers", "safetensors", "sympy"}, name
    assert packages("requirements-control.lock") | packages("requirements-stage.lock") <= packages("requirements.lock")


@pytest.mark.parametrize("name", ["control", "stage", "transformers"])
def test_everything_that_an_extra_names_is_locked(name):
    wanted = {re.split(r"[=<>; ]", each)[0] for each in extras()[name]}
    assert wanted <= packages(f"requirements-{name}.lock")


@pytest.mark.parametrize("path", [CPU, GPU], ids=lambda path: path.name)
def test_torch_has_the_locked_version_and_comes_with_its_libraries_from_the_index_of_the_image(path):
    (version,) = re.findall(r"^ARG TORCH_VERSION=(.+)$", text_of(path), re.MULTILINE)
    assert ("torch", f"torch=={version}") in locked("requirements-transformers.lock")
    (left_out,) = re.findall(r"/\^nvidia-ml-py==/b;/\^(\(.+\))==/d' ", text_of(path))
    left = {package for package in packages("requirements-transformers.lock") if re.fullmatch(left_out, package)}
    assert {"torch", "triton", "cuda-toolkit", "nvidia-cublas"} <= left
    assert left - {"nvidia-ml-py"} == {
        each for each in packages("requirements-transformers.lock") if OF_TORCH.fullmatch(each)
    }


def test_the_stage_of_a_cpu_is_the_one_without_transformers_and_both_end_alike():
    plain, complete = instructions(CPU, "stage"), instructions(CPU, "stage-transformers")
    assert [line for line in plain if "LABEL" not in line] == [line for line in complete if "LABEL" not in line]
    assert re.findall(r"^FROM (\S+) AS stage$", text_of(CPU), re.MULTILINE) == ["stage-packages"]
    installed = " ".join(instructions(CPU, "stage-packages"))
    assert "torch" not in installed
    assert "transformers" not in installed


def test_the_image_for_a_card_differs_in_torch_and_ggml_alone():
    for shared in ("base", "code", "stage-packages"):
        assert instructions(CPU, shared) == instructions(GPU, shared)
    cpu, gpu = instructions(CPU, "transformers-packages"), instructions(GPU, "transformers-packages")
    only_gpu = [line for line in gpu if line not in cpu]
    only_cpu = [line for line in cpu if line not in gpu]
    assert [line.split()[0] for line in only_cpu] == ["ARG"]
    assert [line.split()[0] for line in only_gpu] == ["ARG", "ARG", "RUN", "ENV"]
    index, needed, look = only_gpu[:3]
    assert index == "ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cu126"
    assert needed == 'ARG TORCH_KERNELS="sm_60 sm_61"'
    assert "get_arch_list()" in look
    assert look.endswith("$TORCH_KERNELS")
    without_label = [[line for line in instructions(path, name) if "LABEL" not in line] for path, name in ENDS[2:]]
    assert without_label[0] == without_label[1]


def test_compose_builds_the_stage_that_its_variable_names():
    stage = compose()["services"]["stage-1"]
    assert stage["build"]["target"] == "${STAGE_TARGET:-stage}"
    assert stage["image"] == "noodle-${STAGE_TARGET:-stage}"
    assert compose("docker-compose.gpu.yml")["services"]["stage-0"]["build"]["target"] == "stage"


def test_ggml_is_built_alike_for_both_images_but_for_the_compiler_of_a_card():
    cpu, gpu = instructions(CPU, "ggml"), instructions(GPU, "ggml")
    differences = [(one, other) for one, other in zip(cpu, gpu, strict=True) if one != other]
    assert [one.split()[0] for one, _ in differences] == ["RUN", "ARG"]
    assert differences[1][1] == 'ARG GGML_CMAKE_ARGS="-DGGML_CUDA=ON;-DCMAKE_CUDA_ARCHITECTURES=61"'
    (build,) = [line for line in cpu if "cmake.args" in line]
    assert "-DGGML_NATIVE=OFF" in build  # an image is built on one machine and runs on another
    assert "-DGGML_CPU_ALL_VARIANTS=ON" in build
    # noodle's kernels detect the processor at load; changing them leaves ggml's layer cached
    assert cpu[-1].startswith("RUN cc ")
    assert "-march" not in cpu[-1]


def test_ggml_has_one_version_everywhere_and_what_it_needs_is_locked_for_a_stage():
    assert {line for _, line in locked("requirements-ggml.lock")} == set(extras()["ggml"])
    assert {"numpy", "typing-extensions"} <= packages("requirements-stage.lock")


@pytest.mark.parametrize("path", [CPU, GPU], ids=lambda path: path.name)
def test_old_engines_can_build_it(path):
    text = text_of(path)
    assert "# syntax=" not in text
    assert not re.search(r"<<[A-Z]|--link|--start-interval", text)


@pytest.mark.parametrize(("path", "target"), ENDS)
def test_the_code_comes_after_what_it_depends_on_and_nothing_runs_as_root(path, target):
    lines = instructions(path, target)
    installs = [index for index, line in enumerate(lines) if "pip install" in line]
    code = [index for index, line in enumerate(lines) if line.startswith("COPY --from=code")]
    assert len(code) == 1
    assert max(installs, default=-1) < code[0]
    assert "USER 10001:10001" in lines
    assert not [line for line in lines if "apt-get" in line]
    assert f'org.opencontainers.image.version="{__version__}"' in " ".join(lines)
    assert [line for line in lines if line.startswith("HEALTHCHECK")]


def test_every_service_belongs_to_a_machine():
    profiles = {name: service["profiles"] for name, service in compose()["services"].items()}
    assert {name for name, of in profiles.items() if "b" in of} == {"stage-1"}
    assert {name for name, of in profiles.items() if "a" in of} == {
        "valkey", "planner", "coordinator", "stage-0", "prometheus", "grafana",
    }  # fmt: skip
    assert {name for name, of in profiles.items() if "single" in of} == set(profiles) - {"init"}
    assert profiles["init"] == ["init"]


@pytest.mark.parametrize("name", [name for name in compose()["services"] if name != "init"])
def test_every_container_is_locked_down_and_limited(name):
    service = compose()["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "cap_add" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["restart"] == "unless-stopped"
    assert service["deploy"]["resources"]["limits"].keys() == {"memory", "pids"}
    assert service["stop_grace_period"]


def test_an_image_that_is_built_here_is_never_looked_for_elsewhere():
    built = [service for service in compose()["services"].values() if "build" in service]
    assert len(built) == 5
    assert {service["pull_policy"] for service in built} == {"never"}


def test_the_one_that_may_change_files_of_this_folder_has_no_network():
    init = compose()["services"]["init"]
    assert init["network_mode"] == "none"
    assert init["cap_drop"] == ["ALL"]
    assert set(init["cap_add"]) == {"CHOWN", "DAC_OVERRIDE", "FOWNER"}


def test_ports_are_published_on_loopback_and_on_the_lan_address_alone():
    for name, host in (("docker-compose.yml", "127.0.0.1"), ("docker-compose.lan.yml", r"\${NOODLE_LAN_ADDRESS.*}")):
        ports = [port for service in compose(name)["services"].values() for port in service.get("ports", [])]
        assert ports
        assert not [port for port in ports if not re.match(rf"{host}:\${{NOODLE_", port)]


def test_planner_and_prometheus_are_not_published():
    for path in COMPOSE_FILES:
        for name in ("planner", "prometheus"):
            assert "ports" not in compose(path.name)["services"].get(name, {})


def test_the_published_ports_are_those_that_init_writes():
    text = text_of(ROOT / "docker-compose.yml")
    written = {each.variable: str(each.port) for each in Project(ROOT, "single", {}).published()}
    assert dict(re.findall(r"\$\{(NOODLE_\w+_PORT):-(\d+)\}", text)) == written


@pytest.mark.parametrize("path", COMPOSE_FILES, ids=lambda path: path.name)
def test_every_variable_of_noodle_that_compose_reads_exists(path):
    assert set(re.findall(r"\bNOODLE_\w+", text_of(path))) <= {variable.name for variable in VARIABLES}


@pytest.mark.parametrize("path", COMPOSE_FILES, ids=lambda path: path.name)
def test_compose_2_20_knows_all_of_it(path):
    newer = r"\bgpus:|start_interval|^\s*(configs|models|include|develop|post_start|pre_stop):|required: false|!reset"
    assert not re.search(newer, text_of(path), re.MULTILINE)


def test_the_queue_forgets_nothing():
    command = compose()["services"]["valkey"]["command"]
    options = dict(zip(command[1::2], command[2::2], strict=True))
    assert options["--appendonly"] == "yes"
    assert options["--appendfsync"] == "everysec"
    assert options["--maxmemory"] == "256mb"
    assert options["--maxmemory-policy"] == "noeviction"
    assert options["--aclfile"] == "/run/secrets/valkey.acl"


def test_secrets_and_models_stay_out_of_git_and_out_of_images():
    ignored = text_of(ROOT / ".gitignore").splitlines()
    assert {"/secrets/", ".env"} <= set(ignored)
    assert text_of(ROOT / ".dockerignore").splitlines()[1] == "*"
