"""Few rows are multiplied in the fastest of several layouts, and in all of them the product is the same."""

import itertools
import math

import pytest
import torch
from torch import nn

from services.stage.executors.transformers import linear
from services.stage.executors.transformers.linear import (
    MOST_ROWS,
    GemmLayout,
    SmallBatchLinear,
    choose_gemm_layouts,
    multiply,
)


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(linear, "_choices", {})
    monkeypatch.setattr(linear, "is_faster_packed", lambda _weight, _layouts: False)


def large(out=1024, into=256, **options):
    return nn.Linear(into, out, **options).requires_grad_(False)


@pytest.mark.parametrize(
    ("layout", "count"),
    [*itertools.product((GemmLayout.ROWS, GemmLayout.COLUMNS), (1, 2, 3, MOST_ROWS)), (GemmLayout.TWO_COLUMNS, 1)],
)
def test_every_way_gives_the_product(layout, count):
    weight, rows = torch.randn(300, 200), torch.randn(count, 200)
    torch.testing.assert_close(multiply(layout, weight, rows), rows @ weight.T, rtol=1e-4, atol=1e-4)
    assert multiply(layout, weight, rows).is_contiguous()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 256), (1, 2, 256), (3, 256), (1, MOST_ROWS + 1, 256), (1, 0, 256)])
def test_a_layer_computes_what_it_did_in_whatever_way(bias, shape, monkeypatch):
    layer, given = large(bias=bias), torch.randn(shape)
    expected = layer(given)
    fastest = (GemmLayout.TWO_COLUMNS, *[GemmLayout.COLUMNS] * (MOST_ROWS - 1))
    monkeypatch.setattr(linear, "fastest_layouts", lambda _weight: fastest)
    choose_gemm_layouts(nn.Sequential(layer))
    assert type(layer) is SmallBatchLinear
    torch.testing.assert_close(layer(given), expected)


def test_layouts_are_measured_once_for_layers_that_are_alike(monkeypatch):
    asked = []
    monkeypatch.setattr(
        linear, "fastest_layouts", lambda weight: asked.append(tuple(weight.shape)) or (GemmLayout.ROWS,) * MOST_ROWS
    )
    model = nn.Sequential(large(), large(), large(out=256, into=1024))
    choose_gemm_layouts(model)
    choose_gemm_layouts(nn.Sequential(large()))
    assert asked == [(1024, 256), (256, 1024)]


@pytest.mark.parametrize("shape", [(512, 256), (2048, 1024)])
def test_a_way_is_known_for_every_small_number_of_rows_and_no_large_weight_is_copied(shape, monkeypatch):
    monkeypatch.setattr(linear, "TIMED_BYTES", 4 << 20)
    copies = []
    ones = torch.ones
    monkeypatch.setattr(
        torch, "ones", lambda *sizes, **options: copies.append(math.prod(sizes)) or ones(*sizes, **options)
    )
    layouts = linear.fastest_layouts(torch.randn(shape))
    assert len(layouts) == MOST_ROWS
    assert sum(copies) * 4 < 5 << 20
    assert all(layout is not GemmLayout.TWO_COLUMNS for layout in layouts[1:])


def test_small_layers_and_those_of_another_kind_stay_as_they_are():
    class Other(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 4), Other(512, 512), nn.Linear(512, 512, device="meta"))
    choose_gemm_layouts(model)
    assert [type(module) for module in model] == [nn.Linear, Other, nn.Linear]
