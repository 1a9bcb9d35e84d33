"""The built images: their content, and the cost of a change."""

import json
import re
import shutil
import time

import pytest

from noodle import __version__
from services.stage.executors.ggml.backend import processor_flags
from tests.engine.engine import BASE_IMAGES, CONTROL, ROOT, STAGE, build, docker, in_image, run
from tests.unit.project.test_images import GPU, locked, text_of

CODE_CHANGE_SECONDS = 60.0  # a slow disk takes most of it; installing packages takes minutes
COMPILERS = ("cc", "gcc", "g++", "c++", "clang", "ld", "as", "make", "nvcc")

pytestmark = [pytest.mark.timeout(1800), pytest.mark.usefixtures("images")]


def config_of(image):
    return json.loads(docker("image", "inspect", image))[0]


@pytest.mark.parametrize("image", [CONTROL, STAGE])
def test_nothing_in_it_runs_as_root_or_compiles(image):
    assert in_image(image, "id", "-u").stdout.strip() == "10001"
    found = in_image(image, "sh", "-c", "; ".join(f"command -v {name}" for name in COMPILERS) + "; true")
    assert found.returncode == 0, found.stderr
    assert found.stdout == ""


@pytest.mark.parametrize("image", [CONTROL, STAGE])
def test_it_says_what_it_is_and_how_it_does(image):
    config = config_of(image)["Config"]
    assert config["Labels"]["org.opencontainers.image.version"] == __version__
    assert config["Labels"]["org.opencontainers.image.title"].startswith("noodle ")
    assert config["Healthcheck"]["Test"][:4] == ["CMD", "python", "-P", "-m"]


STAGE_MEGABYTES = 200  # of the default image beyond its base, which has 130 MB from the registry and more if made here


def test_torch_is_in_the_image_with_transformers_alone(image_with_transformers):
    code = "import importlib.metadata as m; print(m.version('torch').partition('+')[0], m.version('transformers'))"
    for image in (CONTROL, STAGE):
        assert "PackageNotFoundError" in in_image(image, "python", "-c", code).stderr
    torch, transformers = in_image(image_with_transformers, "python", "-c", code).stdout.split()
    assert {("torch", f"torch=={torch}"), ("transformers", f"transformers=={transformers}")} <= locked(
        "requirements-transformers.lock"
    )


def test_the_image_of_a_stage_is_small():
    size, base_size = (config_of(image)["Size"] / 1e6 for image in (STAGE, BASE_IMAGES[0]))
    print(f"the image of a stage: {size:.0f} MB, of which {BASE_IMAGES[0]} has {base_size:.0f} MB")
    assert size - base_size < STAGE_MEGABYTES


def test_a_stage_without_transformers_names_the_image_that_has_them():
    code = "from noodle.installation import require_transformers; require_transformers('this model')"
    done = in_image(STAGE, "python", "-P", "-c", code)
    assert "TransformersUnavailable" in done.stderr
    assert "STAGE_TARGET=stage-transformers" in done.stderr


def test_a_stage_has_ggml_with_the_kernels_of_this_processor():
    code = "from services.stage.executors.ggml.backend import load_ggml; g = load_ggml(); print(g.kernels, g.devices)"
    done = in_image(STAGE, "python", "-P", "-c", code, options=("--read-only", "--cap-drop", "ALL"))
    assert re.fullmatch(r"(haswell|alderlake|skylakex|icelake|zen4|armv8\S+) \('CPU',\)\n", done.stdout), done.stderr


def test_a_stage_has_noodles_own_kernels_as_far_as_this_processor_runs_them():
    code = (
        "from services.stage.executors.ggml.graph import GgmlCalls; "
        "from services.stage.executors.ggml.backend import load_ggml; "
        "from services.stage.executors.ggml.kernels.products import packed_weights; "
        "found = packed_weights(GgmlCalls(load_ggml().module)); "
        "print(found and found.instructions)"
    )
    done = in_image(STAGE, "python", "-P", "-c", code)
    expected = "avx512" if "avx512_vnni" in (processor_flags() or ()) else "avx2"
    assert done.stdout.strip() == expected, done.stderr


def test_a_processor_without_avx2_is_named_with_the_cure_and_nothing_dies(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor : 0\nflags : fpu sse2 sse4_2 avx\n", encoding="utf-8")
    code = (
        "import pathlib; from services.stage.executors.ggml import backend as g; "
        "g.check_processor(g.processor_flags(pathlib.Path('/tmp/cpuinfo')))"
    )
    done = in_image(STAGE, "python", "-P", "-c", code, options=("--volume", f"{cpuinfo}:/tmp/cpuinfo:ro"))
    assert done.returncode == 1
    assert "no AVX2" in done.stderr
    assert "NOODLE_EXECUTOR=transformers" in done.stderr


@pytest.mark.parametrize(("image", "lock"), [(CONTROL, "control"), (STAGE, "stage")])
def test_it_has_the_locked_versions(image, lock):
    listed = in_image(image, "pip", "list", "--format", "freeze").stdout.lower()
    installed = set(listed.replace("_", "-").splitlines())
    wanted = {line.partition(" ;")[0] for _, line in locked(f"requirements-{lock}.lock") if " ;" not in line}
    assert wanted <= installed


@pytest.mark.parametrize("image", [CONTROL, STAGE])
def test_the_command_runs_without_a_writable_file_or_any_privilege(image):
    locked_down = ("--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges:true")
    assert in_image(image, "noodle", "--version", options=locked_down).stdout == f"noodle {__version__}\n"
    refused = in_image(image, "touch", "/opt/noodle/x", options=locked_down)
    assert "Read-only file system" in refused.stderr


def test_a_container_that_lacks_everything_says_what_it_lacks():
    done = in_image(CONTROL, "python", "-P", "-m", "services.planner")
    assert done.returncode == 3
    assert "NOODLE_CLUSTER_TOKEN is missing" in done.stderr
    done = in_image(
        STAGE, "python", "-P", "-m", "services.stage", options=("--env", f"NOODLE_CLUSTER_TOKEN={'x' * 16}")
    )
    assert done.returncode == 3
    assert "NOODLE_ADVERTISE_URL" in done.stderr


def test_a_change_of_code_is_built_in_seconds_and_leaves_the_layers_below_as_they_are(tmp_path):
    for path in (ROOT / "Dockerfile.cpu", ROOT / ".dockerignore", *ROOT.glob("requirements*.lock")):
        shutil.copy2(path, tmp_path / path.name)
    for name in ("services", "shared"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    main = tmp_path / "services" / "stage" / "__main__.py"
    main.write_text(main.read_text(encoding="utf-8") + f"# changed at {time.time()}\n", encoding="utf-8")
    changed = f"{STAGE}-changed"
    began = time.monotonic()
    command = ["build", "--file", str(tmp_path / "Dockerfile.cpu"), "--target", "stage", "--tag", changed]
    docker(*command, str(tmp_path), seconds=600)
    seconds = time.monotonic() - began
    try:
        before, after = (config_of(image)["RootFS"]["Layers"] for image in (STAGE, changed))
        assert before[:-1] == after[:-1]
        assert before[-1] != after[-1]  # the code
        assert seconds < CODE_CHANGE_SECONDS
        print(f"a change of code: {seconds:.1f} s")
    finally:
        run(["docker", "image", "rm", changed])


def test_the_look_for_a_cards_kernels_refuses_a_wheel_without_them(image_with_transformers):
    (look,) = re.findall(r'^RUN python -c "(import sys, torch; .+)" \$TORCH_KERNELS$', text_of(GPU), re.MULTILINE)
    refused = in_image(image_with_transformers, "python", "-c", look, "sm_60", "sm_61")  # its wheel has none for Pascal
    assert refused.returncode == 1
    assert re.search(r"AssertionError: \[('sm_75'.*)?\]", refused.stderr)  # a wheel for CPUs alone has none at all


def test_the_file_for_a_card_is_read_by_this_engine():
    build("Dockerfile.gpu", "base", "noodle-test-base")  # the later stages need an index and gigabytes
