"""The choice of device and dtype on machines that are not here, by a torch whose few CUDA calls are made up."""

from types import SimpleNamespace

import pytest

from noodle.errors import ConfigurationError
from noodle.metrics.scraped import CardUse
from services.stage.selection.device import FreeMemory, card_use, choose_device, choose_dtype, device_name, free_memory

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


def fake_torch(**options):
    return SimpleNamespace(cuda=FakeCuda(**options), __version__="2.14.1")


def test_auto_is_the_cpu_where_no_card_is():
    choice = choose_device("auto", fake_torch())
    assert choice.value == "cpu"
    assert "no CUDA device" in choice.reason


def test_auto_is_the_card_that_torch_has_kernels_for():
    assert choose_device("auto", fake_torch(capability=(6, 1), kernels=CU126)).value == "cuda"


def test_cpu_is_the_cpu_even_beside_a_card():
    assert choose_device("cpu", fake_torch(capability=(6, 1), kernels=CU126)).value == "cpu"


def test_a_card_that_is_asked_for_and_missing_is_refused():
    with pytest.raises(ConfigurationError) as refusal:
        choose_device("cuda", fake_torch())
    assert "NOODLE_DEVICE=cpu" in refusal.value.cure


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_a_pascal_card_under_a_torch_without_its_kernels_is_refused_with_the_way_out(wanted):
    with pytest.raises(ConfigurationError) as refusal:
        choose_device(wanted, fake_torch(capability=(6, 1), kernels=CU130))
    assert "6.1" in str(refusal.value)
    assert "Dockerfile.gpu" in refusal.value.cure
    assert "cu126" in refusal.value.cure


def test_a_card_that_is_too_new_for_the_image_is_told_what_to_build_it_with():
    with pytest.raises(ConfigurationError) as refusal:
        choose_device("cuda", fake_torch(capability=(12, 0), kernels=CU126))
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
def test_kernels_run_on_cards_of_their_major_version_and_ptx_on_later_ones(capability, kernels, runs):
    torch = fake_torch(capability=capability, kernels=kernels)
    if runs:
        assert choose_device("cuda", torch).value == "cuda"
    else:
        with pytest.raises(ConfigurationError):
            choose_device("cuda", torch)


def test_dtype_auto_is_exact_on_a_cpu_and_native_on_a_card():
    assert choose_dtype("auto", "cpu", fake_torch()).value == "float32"
    assert choose_dtype("auto", "cuda", fake_torch(capability=(8, 0), native_bfloat16=True)).value == "bfloat16"
    assert choose_dtype("auto", "cuda", fake_torch(capability=(6, 1))).value == "float16"


def test_bfloat16_on_a_card_that_emulates_it_is_refused():
    with pytest.raises(ConfigurationError) as refusal:
        choose_dtype("bfloat16", "cuda", fake_torch(capability=(6, 1)))
    assert "float16" in refusal.value.cure


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_configured_dtype_is_taken_on_a_cpu(dtype):
    assert choose_dtype(dtype, "cpu", fake_torch()) == choose_dtype(dtype, "cpu", fake_torch())
    assert choose_dtype(dtype, "cpu", fake_torch()).value == dtype


def test_a_device_has_a_name():
    assert device_name("cuda", fake_torch(capability=(6, 1))) == "NVIDIA GeForce GTX 1050"
    assert device_name("cpu", fake_torch())


@pytest.fixture
def proc(tmp_path, monkeypatch):
    (tmp_path / "proc").mkdir()
    fields = {"MemTotal": 16000, "MemAvailable": 8000}
    names = ("MemTotal", "MemFree", "MemAvailable", "Buffers", "Cached", "Shmem", "Active", "Inactive")
    text = "".join(f"{name}: {fields.get(name, 0)} kB\n" for name in names)
    (tmp_path / "proc/meminfo").write_text(text)
    monkeypatch.setattr("psutil.PROCFS_PATH", str(tmp_path / "proc"))


@pytest.mark.usefixtures("proc")
def test_free_memory_is_what_the_system_has_available(tmp_path):
    memory = free_memory("cpu", fake_torch(), cgroup=tmp_path / "none")
    assert memory == FreeMemory(8000 * 1024, "MemAvailable of the system")


@pytest.mark.usefixtures("proc")
@pytest.mark.parametrize("version", [1, 2])
def test_a_containers_limit_bounds_the_free_memory(version, tmp_path):
    folder = tmp_path / "cgroup" / ("memory" if version == 1 else "")
    folder.mkdir(parents=True)
    limit, used = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else ("memory.max", "memory.current")
    )
    (folder / limit).write_text("5000000\n")
    (folder / used).write_text("3000000\n")
    (folder / "memory.stat").write_text("anon 1\ninactive_file 500000\ntotal_inactive_file 500000\n")
    memory = free_memory("cpu", fake_torch(), cgroup=tmp_path / "cgroup")
    assert memory.free_bytes == 2_500_000
    assert f"v{version}" in memory.source


@pytest.mark.usefixtures("proc")
@pytest.mark.parametrize("no_limit", ["max", "9223372036854771712"])
def test_a_container_without_limit_bounds_nothing(no_limit, tmp_path):
    for folder, limit, used in (
        (tmp_path / "cgroup", "memory.max", "memory.current"),
        (tmp_path / "cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        folder.mkdir(parents=True)
        (folder / limit).write_text(no_limit)
        (folder / used).write_text("1000")
    memory = free_memory("cpu", fake_torch(), cgroup=tmp_path / "cgroup")
    assert memory.source == "MemAvailable of the system"


def test_free_memory_of_a_card_is_what_its_driver_says():
    assert free_memory("cuda", fake_torch(capability=(6, 1))).free_bytes == 3_000_000_000


def test_a_card_is_told_of_as_far_as_its_driver_tells():
    card = CardUse("NVIDIA GeForce GTX 1050", 4_000_000_000, 3_000_000_000, busy_share=0.25, celsius=None)
    torch = fake_torch(capability=(6, 1))
    assert card_use(torch) == card

    def failed():
        raise RuntimeError("CUDA error: unspecified launch failure")

    torch.cuda.mem_get_info = failed
    assert card_use(torch) is None


def test_this_machine_has_some_memory():
    assert free_memory("cpu", fake_torch()).free_bytes > 1 << 20
