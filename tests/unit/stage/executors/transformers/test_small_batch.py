"""Few rows are multiplied in the fastest of several ways, and in all of them the product is the same."""

import itertools
import math

import pytest
import torch
from torch import nn

from services.stage.executors.transformers import small_batch
from services.stage.executors.transformers.small_batch import MOST_ROWS, FewRowsLinear, Way, choose_ways, multiplied


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(small_batch, "_known", {})
    monkeypatch.setattr(small_batch, "is_faster_packed", lambda _weight, _ways: False)


def large(out=1024, into=256, **options):
    return nn.Linear(into, out, **options).requires_grad_(False)


@pytest.mark.parametrize(
    ("way", "count"), [*itertools.product((Way.ROWS, Way.COLUMNS), (1, 2, 3, MOST_ROWS)), (Way.TWO_COLUMNS, 1)]
)
def test_every_way_gives_the_product(way, count):
    weight, rows = torch.randn(300, 200), torch.randn(count, 200)
    torch.testing.assert_close(multiplied(way, weight, rows), rows @ weight.T, rtol=1e-4, atol=1e-4)
    assert multiplied(way, weight, rows).is_contiguous()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 256), (1, 2, 256), (3, 256), (1, MOST_ROWS + 1, 256), (1, 0, 256)])
def test_a_layer_computes_what_it_did_in_whatever_way(bias, shape, monkeypatch):
    layer, given = large(bias=bias), torch.randn(shape)
    expected = layer(given)
    fastest = (Way.TWO_COLUMNS, *[Way.COLUMNS] * (MOST_ROWS - 1))
    monkeypatch.setattr(small_batch, "fastest_ways", lambda _weight: fastest)
    choose_ways(nn.Sequential(layer))
    assert type(layer) is FewRowsLinear
    torch.testing.assert_close(layer(given), expected)


def test_ways_are_measured_once_for_layers_that_are_alike(monkeypatch):
    asked = []
    monkeypatch.setattr(
        small_batch, "fastest_ways", lambda weight: asked.append(tuple(weight.shape)) or (Way.ROWS,) * MOST_ROWS
    )
    model = nn.Sequential(large(), large(), large(out=256, into=1024))
    choose_ways(model)
    choose_ways(nn.Sequential(large()))
    assert asked == [(1024, 256), (256, 1024)]


@pytest.mark.parametrize("shape", [(512, 256), (2048, 1024)])
def test_a_way_is_known_for_every_small_number_of_rows_and_no_large_weight_is_copied(shape, monkeypatch):
    monkeypatch.setattr(small_batch, "TIMED_BYTES", 4 << 20)
    copies = []
    ones = torch.ones
    monkeypatch.setattr(
        torch, "ones", lambda *sizes, **options: copies.append(math.prod(sizes)) or ones(*sizes, **options)
    )
    ways = small_batch.fastest_ways(torch.randn(shape))
    assert len(ways) == MOST_ROWS
    assert sum(copies) * 4 < 5 << 20
    assert all(way is not Way.TWO_COLUMNS for way in ways[1:])


def test_small_layers_and_those_of_another_kind_stay_as_they_are():
    class Other(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 4), Other(512, 512), nn.Linear(512, 512, device="meta"))
    choose_ways(model)
    assert [type(module) for module in model] == [nn.Linear, Other, nn.Linear]
