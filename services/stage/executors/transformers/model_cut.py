"""A transformers model of which only some layers exist; knows module structure, not weights.

The whole model is described on torch's meta device, where nothing takes memory, so that every layer is made with its
true index; then what other stages compute is taken out, before any weight is allocated.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM

from noodle.errors import UnsupportedModel
from noodle.model.families import FAMILIES


class _HandsOn(torch.nn.Module):
    """Stands for a module of another stage: what comes in goes on."""

    def forward(self, hidden_states: torch.Tensor, *_arguments: Any, **_options: Any) -> torch.Tensor:
        return hidden_states


class _NoPositions(torch.nn.Module):
    """Stands for learned positions, which the first stage has added already."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        # no dimensions, so that it may be added on any device; no buffer, for it is nothing to be loaded
        self.zero = torch.zeros((), dtype=dtype, device="cpu")

    def forward(self, *_arguments: Any, **_options: Any) -> torch.Tensor:
        return self.zero


class _Layers(torch.nn.ModuleList):
    """The layers of a slice. Transformers takes `layers[:count]` in each step, which makes a list of modules anew."""

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice) and range(*index.indices(len(self))) == range(len(self)):
            return self
        return super().__getitem__(index)


def base_model_of(model: Any) -> Any:
    """The module that holds the layers: a CausalLM without its head."""
    base = getattr(model, model.base_model_prefix, None)
    return model.model if base is None else base


def cut_class(config: Any, start_layer: int, end_layer: int) -> Any:
    """A subclass of the config's CausalLM class whose instances hold layers [start_layer, end_layer) alone.

    Without the embeddings unless the first layer is in, and without norm and head unless the last one is.
    """
    whole_class = AutoModelForCausalLM._model_mapping[type(config)]

    def build(self: Any, config: Any, *arguments: Any, **options: Any) -> None:
        whole_class.__init__(self, config, *arguments, **options)
        _take_out_foreign_modules(self, start_layer, end_layer)

    # the same name and module, because transformers finds a model's checkpoint conversions by them
    return type(whole_class.__name__, (whole_class,), {"__init__": build, "__module__": whole_class.__module__})


def layer_list_name(model: Any) -> str:
    """Name of the base model's list of layers."""
    base = base_model_of(model)
    names = [str(name) for name, child in base.named_children() if isinstance(child, torch.nn.ModuleList)]
    if len(names) != 1:
        raise UnsupportedModel(
            f"a {model.config.model_type} model has {len(names)} lists of layers ({', '.join(names)}), and exactly one "
            "can be cut.",
            cure="Choose a model of another type.",
        )
    return names[0]


def _take_out_foreign_modules(model: Any, start_layer: int, end_layer: int) -> None:
    base, config = base_model_of(model), model.config
    layer_count: int = config.num_hidden_layers
    list_name = layer_list_name(model)
    names = [name for name, _ in base.named_children()]
    before, after = _around_layers(base, names, list_name)
    setattr(base, list_name, _Layers(list(getattr(base, list_name))[start_layer:end_layer]))
    for each in {id(config): config, id(base.config): base.config}.values():
        each.num_hidden_layers = end_layer - start_layer
        # the one per-layer list that transformers reads while it computes; by the layer's place in the list
        if getattr(each, "layer_types", None):
            each.layer_types = list(each.layer_types)[start_layer:end_layer]
    learned_positions = FAMILIES[config.model_type].learned_positions
    if start_layer > 0:
        for name in before:
            if name == learned_positions:
                setattr(base, name, _NoPositions(torch.get_default_dtype()))
            else:
                setattr(base, name, _HandsOn())
    if end_layer < layer_count:
        for name in after:
            setattr(base, name, _HandsOn())
        for name, child in model.named_children():
            if child is not base:
                setattr(model, name, _HandsOn())
    # with both ends here tying is transformers' own business; else each end has its own copy of the tensor
    model.tied_keys_of_whole_model = dict(model.all_tied_weights_keys)
    if not (start_layer == 0 and end_layer == layer_count):
        model.all_tied_weights_keys = {}
        base.all_tied_weights_keys = {}


def _around_layers(base: Any, names: list[str], list_name: str) -> tuple[list[str], list[str]]:
    """Children of the base model that belong to the first stage, and those that belong to the last.

    By transformers' own pipeline plan, or, where a family has none, by order among those that have weights.
    Children without weights of their own (rotary, dropout) are on every stage.
    """
    plan = [name for name in (getattr(base.config, "base_model_pp_plan", None) or {}) if name in names]
    if not plan:
        plan = [name for name in names if next(getattr(base, name).parameters(), None) is not None]
    place = plan.index(list_name)
    return plan[:place], plan[place + 1 :]
