"""The choice of device and dtype with a torch whose CUDA calls are made up."""

from types import SimpleNamespace

import pytest

from noodle.errors import ConfigurationError
from noodle.metrics.machine import MachineUse
from noodle.metrics.scraped import CardUse
from services.stage.executors import load
from services.stage.executors.transformers import runtime
from services.stage.selection import device
from services.stage.selection.device import FreeMemory, choose_device, choose_dtype, device_name, free_memory

CU126 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]
CU130 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


class FakeCuda:
    def __init__(self, capability=None, kernels=(), native_bfloat16=False):
        self.capability, self.kernels, self.native_bfloat16 = capability, list(kernels), native_bfloat16

    def is_available(self):
        return self.capability is not None

    def get_device_capability(self):
        return self.capability

    def get_arch_list(self):
        return self.kernels

    def get_device_name(self):
        return "NVIDIA GeForce GTX 1050"

    def is_bf16_supported(self, including_emulation=True):
        return including_emulation or self.native_bfloat16

    def mem_get_info(self):
        return 3_000_000_000, 4_000_000_000

    def utilization(self):
        return 25

    def temperature(self):
        raise RuntimeError("Driver Not Loaded")


@pytest.fixture
def torch_has(monkeypatch):
    """Replaces torch by one with a made-up card."""

    def replace(**options):
        monkeypatch.setattr(runtime, "torch", SimpleNamespace(cuda=FakeCuda(**options), __version__="2.14.1"))
        return runtime.torch

    return replace


@pytest.fixture(autouse=True)
def driver(monkeypatch, tmp_path):
    """An NVIDIA driver is installed."""
    path = tmp_path / "nvidiactl"
    path.touch()
    monkeypatch.setattr(device, "NVIDIA_DRIVER", path)
    return path


def choose(wanted):
    return choose_device(wanted, ggml_only=False, has_torch=True)


def test_auto_is_the_cpu_without_a_card(torch_has):
    torch_has()
    choice = choose("auto")
    assert choice.value == "cpu"
    assert "no CUDA device" in choice.reason


def test_without_a_driver_torch_is_not_asked_for_a_card(driver, monkeypatch):
    driver.unlink()
    monkeypatch.setattr(runtime, "choose_cpu_or_card", lambda _: pytest.fail("asked"))
    assert choose("auto").value == "cpu"


@pytest.mark.parametrize("options", [{"ggml_only": True, "has_torch": True}, {"ggml_only": False, "has_torch": False}])
@pytest.mark.parametrize(("devices", "chosen"), [(("CPU",), "cpu"), (("CUDA0", "CPU"), "cuda")])
def test_where_ggml_alone_may_compute_auto_is_the_card_that_ggml_is_built_for(options, devices, chosen, monkeypatch):
    monkeypatch.setattr(runtime, "choose_cpu_or_card", lambda _: pytest.fail("asked"))
    monkeypatch.setattr(load, "load_ggml", lambda: SimpleNamespace(devices=devices))
    assert choose_device("auto", **options).value == chosen
    assert choose_device("cuda", **options).value == "cuda"  # refused by name when the executor is chosen


def test_auto_is_the_card_that_torch_has_kernels_for(torch_has):
    torch_has(capability=(6, 1), kernels=CU126)
    assert choose("auto").value == "cuda"


def test_cpu_is_the_cpu_even_beside_a_card(torch_has):
    torch_has(capability=(6, 1), kernels=CU126)
    assert choose("cpu").value == "cpu"


def test_a_requested_card_that_is_missing_is_refused(torch_has):
    torch_has()
    with pytest.raises(ConfigurationError) as refusal:
        choose("cuda")
    assert "NOODLE_DEVICE=cpu" in refusal.value.cure


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_a_pascal_card_under_a_torch_without_its_kernels_is_refused_with_the_way_out(wanted, torch_has):
    torch_has(capability=(6, 1), kernels=CU130)
    with pytest.raises(ConfigurationError) as refusal:
        choose(wanted)
    assert "6.1" in str(refusal.value)
    assert "Dockerfile.gpu" in refusal.value.cure
    assert "cu126" in refusal.value.cure


def test_the_refusal_of_a_card_that_is_too_new_for_the_image_names_what_to_build_it_with(torch_has):
    torch_has(capability=(12, 0), kernels=CU126)
    with pytest.raises(ConfigurationError) as refusal:
        choose("cuda")
    assert "cu130" in refusal.value.cure
    assert "TORCH_KERNELS=sm_120" in refusal.value.cure


@pytest.mark.parametrize(
    ("capability", "kernels", "runs"),
    [
        ((8, 9), CU126, True),  # binary code of the same major version
        ((12, 1), CU130, True),
        ((13, 0), CU130, True),  # by PTX
        ((10, 0), CU126, False),
        ((7, 0), CU130, False),
        ((9, 1), ["sm_90a"], False),  # for that one card alone
        ((9, 0), ["sm_90a"], True),
    ],
)
def test_kernels_run_on_cards_of_their_major_version_and_ptx_on_later_ones(capability, kernels, runs, torch_has):
    torch_has(capability=capability, kernels=kernels)
    if runs:
        assert choose("cuda").value == "cuda"
    else:
        with pytest.raises(ConfigurationError):
            choose("cuda")


def test_dtype_auto_is_exact_on_a_cpu_and_native_on_a_card(torch_has):
    torch_has()
    assert choose_dtype("auto", "cpu").value == "float32"
    torch_has(capability=(8, 0), native_bfloat16=True)
    assert choose_dtype("auto", "cuda").value == "bfloat16"
    torch_has(capability=(6, 1))
    assert choose_dtype("auto", "cuda").value == "float16"


def test_bfloat16_on_a_card_that_emulates_it_is_refused(torch_has):
    torch_has(capability=(6, 1))
    with pytest.raises(ConfigurationError) as refusal:
        choose_dtype("bfloat16", "cuda")
    assert "float16" in refusal.value.cure


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_configured_dtype_is_taken_on_a_cpu(dtype):
    assert choose_dtype(dtype, "cpu").value == dtype


def test_a_device_has_a_name(torch_has):
    torch_has(capability=(6, 1))
    assert device_name("cuda", "transformers") == "NVIDIA GeForce GTX 1050"
    assert device_name("cpu", "ggml")


@pytest.fixture
def system(monkeypatch):
    """A machine with 8,000 kB available."""
    monkeypatch.setattr(device, "machine_use", lambda: MachineUse(2, 0.0, 16_000 * 1024, 8_000 * 1024))


def test_free_memory_is_what_the_system_has_available(system, tmp_path):
    memory = free_memory("cpu", "ggml", cgroup=tmp_path / "none")
    assert memory == FreeMemory(8000 * 1024, "available on the system")


def test_a_system_that_does_not_report_its_memory_is_refused(monkeypatch):
    monkeypatch.setattr(device, "machine_use", lambda: None)
    with pytest.raises(ConfigurationError) as refusal:
        free_memory("cpu", "ggml")
    assert "Linux" in refusal.value.cure


@pytest.mark.parametrize("version", [1, 2])
def test_a_containers_limit_bounds_the_free_memory(version, system, tmp_path):
    folder = tmp_path / "cgroup" / ("memory" if version == 1 else "")
    folder.mkdir(parents=True)
    limit, used = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else ("memory.max", "memory.current")
    )
    (folder / limit).write_text("5000000\n")
    (folder / used).write_text("3000000\n")
    (folder / "memory.stat").write_text("anon 1\ninactive_file 500000\ntotal_inactive_file 500000\n")
    memory = free_memory("cpu", "ggml", cgroup=tmp_path / "cgroup")
    assert memory.free_bytes == 2_500_000
    assert f"v{version}" in memory.source


@pytest.mark.usefixtures("system")
@pytest.mark.parametrize("no_limit", ["max", "9223372036854771712"])
def test_a_container_without_limit_bounds_nothing(no_limit, tmp_path):
    for folder, limit, used in (
        (tmp_path / "cgroup", "memory.max", "memory.current"),
        (tmp_path / "cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        folder.mkdir(parents=True)
        (folder / limit).write_text(no_limit)
        (folder / used).write_text("1000")
    memory = free_memory("cpu", "ggml", cgroup=tmp_path / "cgroup")
    assert memory.source == "available on the system"


def test_free_memory_of_a_card_is_what_its_driver_reports(torch_has):
    torch_has(capability=(6, 1))
    assert free_memory("cuda", "transformers").free_bytes == 3_000_000_000


def test_a_cards_use_is_reported_as_far_as_its_driver_reports_it(torch_has):
    torch = torch_has(capability=(6, 1))
    card = CardUse("NVIDIA GeForce GTX 1050", 4_000_000_000, 3_000_000_000, busy_share=0.25, celsius=None)
    assert runtime.card_use() == card

    def failed():
        raise RuntimeError("CUDA error: unspecified launch failure")

    torch.cuda.mem_get_info = failed
    assert runtime.card_use() is None


def test_this_machine_has_some_memory():
    assert free_memory("cpu", "ggml").free_bytes > 1 << 20
