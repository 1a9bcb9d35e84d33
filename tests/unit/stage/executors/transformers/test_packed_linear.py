"""A weight in the matrix library's own order gives the same products, and is all that is held of it."""

import pytest
import torch
from torch import nn

from services.stage.executors.transformers import linear
from services.stage.executors.transformers.linear import (
    GemmLayout,
    PackedLinear,
    SmallBatchLinear,
    choose_gemm_layouts,
    is_faster_packed,
    pack,
    weight_bytes,
)

pytestmark = pytest.mark.skipif(pack(torch.ones(64, 64)) is None, reason="this torch has no order of its own")


@pytest.fixture
def packs_all(monkeypatch):
    monkeypatch.setattr(linear, "_choices", {})
    monkeypatch.setattr(linear, "fastest_layouts", lambda _weight: (GemmLayout.ROWS,))
    monkeypatch.setattr(linear, "is_faster_packed", lambda _weight, _layouts: True)


def large(out=1024, into=256, **options):
    return nn.Linear(into, out, **options).requires_grad_(False)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 256), (1, 2, 256), (3, 256), (1, 130, 256), (1, 0, 256), (2, 5, 256)])
def test_a_packed_layer_computes_what_it_did(bias, shape, packs_all):
    layer, given = large(bias=bias), torch.randn(shape)
    expected = layer(given)
    choose_gemm_layouts(nn.Sequential(layer))
    assert type(layer) is PackedLinear
    torch.testing.assert_close(layer(given), expected, rtol=1e-4, atol=1e-4)


def test_rows_that_do_not_lie_side_by_side_are_multiplied_too(packs_all):
    layer, given = large(), torch.randn(256, 7)
    expected = layer(given.T)
    choose_gemm_layouts(nn.Sequential(layer))
    torch.testing.assert_close(layer(given.T), expected, rtol=1e-4, atol=1e-4)


def test_who_asks_for_the_plain_weight_gets_it(packs_all):
    layer = large(bias=True)
    weight = layer.weight.clone()
    choose_gemm_layouts(nn.Sequential(layer))
    assert torch.equal(layer.weight, weight)


def test_a_packed_weight_is_counted_once_and_a_shared_one_beside_its_copy(packs_all):
    model = nn.Sequential(nn.Embedding(1024, 256), large(bias=False), large(bias=False)).requires_grad_(False)
    model[1].weight = model[0].weight
    assert weight_bytes(model) == 2 * 1024 * 256 * 4
    choose_gemm_layouts(model)
    assert weight_bytes(model) == 3 * 1024 * 256 * 4
    assert [name for name, _ in model.named_parameters()] == ["0.weight"]
    assert model[0](torch.tensor([5])).shape == (1, 256)


def test_what_can_not_be_packed_stays_as_it_is(packs_all, monkeypatch):
    monkeypatch.setattr(linear, "_reorder", None)
    layer = large()
    choose_gemm_layouts(nn.Sequential(layer))
    assert type(layer) is SmallBatchLinear
    assert not is_faster_packed(layer.weight, (GemmLayout.ROWS,))


@pytest.mark.parametrize(
    ("seconds", "packs"),
    [((1.0, 0.5), True), ((1.0, 0.95), False), ((0.5, 1.0), False)],
)
def test_what_is_faster_decides(seconds, packs, monkeypatch):
    monkeypatch.setattr(linear, "TIMED_BYTES", 1 << 20)
    monkeypatch.setattr(linear, "least_seconds", lambda _runs, _rounds: list(seconds))
    assert linear.is_faster_packed(torch.ones(1024, 256), (GemmLayout.ROWS,) * 8) is packs


def test_a_copy_that_is_slower_for_one_number_of_rows_is_not_kept(monkeypatch):
    monkeypatch.setattr(linear, "TIMED_BYTES", 1 << 20)
    answers = iter([[1.0, 1.2], *[[1.0, 0.3]] * 10])
    monkeypatch.setattr(linear, "least_seconds", lambda _runs, _rounds: next(answers))
    assert not linear.is_faster_packed(torch.ones(1024, 256), (GemmLayout.ROWS,) * 8)
