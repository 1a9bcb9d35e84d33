import importlib.util

import pytest

from noodle import installation
from noodle.errors import TransformersUnavailable
from noodle.installation import require_transformers


@pytest.fixture
def without_torch(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else real(name))


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """noodle is no checkout, and runs in no container."""
    monkeypatch.setattr(installation, "CHECKOUT", tmp_path)
    monkeypatch.setattr(installation, "CONTAINER_MARKS", ())
    return tmp_path


def cure(**options):
    with pytest.raises(TransformersUnavailable) as caught:
        require_transformers("A model of type mamba", **options)
    assert caught.value.message == "A model of type mamba needs torch and transformers, which are not installed here."
    return caught.value.cure


def test_a_checkout_without_them_names_the_make_target_that_exists(without_torch):
    assert "`make transformers`" in cure()
    makefile = (installation.CHECKOUT / "Makefile").read_text(encoding="utf-8")
    assert "\ntransformers: $(TRANSFORMERS_STAMP)" in makefile


def test_a_container_without_them_names_the_images_target_that_exists(without_torch, elsewhere, monkeypatch):
    monkeypatch.setattr(installation, "CONTAINER_MARKS", (elsewhere,))
    assert "STAGE_TARGET=stage-transformers" in cure()


def test_an_installed_package_names_the_extra(without_torch, elsewhere):
    assert cure(otherwise="Or use --no-control.") == "Run `pip install 'noodle[transformers]'`. Or use --no-control."


def test_with_them_there_is_no_error():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    require_transformers("Measuring")
