import ctypes
import importlib.util
import os
import platform
from pathlib import Path

import pytest

from noodle.errors import GgmlUnavailable
from services.stage.executors.ggml import backend
from services.stage.executors.ggml.backend import check_processor, keep_float32_on_cards, load_ggml, processor_flags
from tests.support.stages.executors import need_ggml

needs_ggml = pytest.mark.skipif(importlib.util.find_spec("ggml") is None, reason="ggml is not installed (make ggml)")


def test_a_processor_without_avx2_is_named_before_anything_of_ggml_is_loaded(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu sse4_2 avx f16c\n", encoding="utf-8")

    flags = processor_flags(cpuinfo)

    if platform.machine() == "x86_64":
        assert flags == {"fpu", "sse4_2", "avx", "f16c"}
    with pytest.raises(GgmlUnavailable, match="no AVX2") as caught:
        check_processor(frozenset({"avx"}))
    assert "NOODLE_EXECUTOR=transformers" in caught.value.cure


def test_a_processor_that_is_not_told_of_is_not_refused(tmp_path: Path) -> None:
    assert processor_flags(tmp_path / "missing") is None
    check_processor(None)


def test_a_machine_without_ggml_is_told_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)

    with pytest.raises(GgmlUnavailable, match="not installed") as caught:
        backend.folder_of_libraries()

    assert "make ggml" in caught.value.cure


@needs_ggml
def test_ggml_is_loaded_once_and_says_its_version_and_its_devices() -> None:
    library = load_ggml()

    assert library is load_ggml()
    assert library.version.startswith(backend.ggml_version())
    assert "CPU" in library.devices


@needs_ggml
def test_a_build_for_another_processor_is_refused_by_name() -> None:
    folder = backend.folder_of_libraries()
    library = load_ggml()
    used = [flag for function, flag in backend.NEEDED_FLAGS.items() if getattr(library.module, function)()]
    if not used:
        pytest.skip("this build uses none of the flags")

    with pytest.raises(GgmlUnavailable, match="another processor"):
        backend._load(folder, frozenset({"avx2"} | set(used[1:]) - {used[-1]}))


@needs_ggml
def test_a_backend_computes_with_the_threads_it_is_given_and_an_unknown_device_is_named() -> None:
    library = load_ggml()

    backend = library.backend(2)
    library.set_threads(backend, 1)
    library.module.ggml_backend_free(backend)

    with pytest.raises(GgmlUnavailable, match="no device Abacus0"):
        library.backend(1, "Abacus0")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="those kernels are of this kind of processor")
def test_ggml_was_built_with_the_switches_that_make_prompts_fast() -> None:
    """pip heeds no switch for a requirement that stands in a file, and says nothing of it."""
    need_ggml()
    kernels = sorted(Path(load_ggml().module.__file__ or "").parent.glob("lib/libggml-cpu*"))

    assert kernels
    assert all(b"llamafile_sgemm" in path.read_bytes() for path in kernels)


def test_a_rebuilt_ggml_is_another_build_of_the_same_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "libggml-cpu.so"
    library.touch()
    monkeypatch.setattr(backend, "folder_of_libraries", lambda: tmp_path)
    os.utime(library, (1_700_000_000, 1_700_000_000))
    first = backend.ggml_build()
    os.utime(library, (1_700_000_060, 1_700_000_060))

    assert first
    assert backend.ggml_build() not in ("", first)
    library.unlink()
    assert backend.ggml_build() == ""


def test_where_exactness_is_asked_cards_are_told_to_stay_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GGML_VK_DISABLE_F16", "")  # what it was is put back
    keep_float32_on_cards()
    seen_by_c = ctypes.CDLL(None).getenv
    seen_by_c.restype = ctypes.c_char_p
    assert seen_by_c(b"GGML_VK_DISABLE_F16") == b"1"
