"""Transformers models cut to some of their layers.

The whole model is built on torch's meta device, which takes no memory, so that every layer gets its true index. The
modules of other stages are then removed, before any weight is allocated.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from noodle.errors import UnsupportedModel
from noodle.model.families import LEARNED_POSITIONS


class _Identity(torch.nn.Module):
    """Replaces a module of another stage: returns its input."""

    def forward(self, hidden_states: torch.Tensor, *_arguments: Any, **_options: Any) -> torch.Tensor:
        return hidden_states


class _NoPositions(torch.nn.Module):
    """Replaces learned positions, which the first stage has already added."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        # without dimensions it can be added on any device; a buffer would have to be loaded
        self.zero = torch.zeros((), dtype=dtype, device="cpu")

    def forward(self, *_arguments: Any, **_options: Any) -> torch.Tensor:
        return self.zero


class _Layers(torch.nn.ModuleList):
    """A slice's layers; `layers[:count]`, which transformers evaluates in each step, creates no new list."""

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice) and range(*index.indices(len(self))) == range(len(self)):
            return self
        return super().__getitem__(index)


def base_model_of(model: Any) -> Any:
    """The module that holds the layers: a CausalLM without its head."""
    base = getattr(model, model.base_model_prefix, None)
    return model.model if base is None else base


class _Computed:
    """Overrides a base model's forward: returns an output that was computed before."""

    output: Any = None

    def forward(self, *_arguments: Any, **_options: Any) -> Any:
        return self.output


def with_computed_layers(model: Any) -> tuple[Any, Any]:
    """The same model with a base whose `output` is set instead of computed, to apply the head alone; and that base.

    Both are shallow copies that share all modules and weights with the model.
    """
    base = base_model_of(model)
    computed, head = copy.copy(base), copy.copy(model)
    computed.__class__ = type(type(base).__name__, (_Computed, type(base)), {})
    head._modules = {name: computed if child is base else child for name, child in model._modules.items()}
    return head, computed


def cut_class(config: Any, start_layer: int, end_layer: int) -> Any:
    """A subclass of the config's CausalLM class with layers [start_layer, end_layer) alone.

    It has embeddings only with the first layer, and norm and head only with the last one.
    """
    whole_class = AutoModelForCausalLM._model_mapping[type(config)]

    def build(self: Any, config: Any, *arguments: Any, **options: Any) -> None:
        whole_class.__init__(self, config, *arguments, **options)
        _remove_foreign_modules(self, start_layer, end_layer)

    # transformers finds a model's checkpoint conversions by class name and module
    return type(whole_class.__name__, (whole_class,), {"__init__": build, "__module__": whole_class.__module__})


def layer_list_name(model: Any) -> str:
    base = base_model_of(model)
    names = [str(name) for name, child in base.named_children() if isinstance(child, torch.nn.ModuleList)]
    if len(names) != 1:
        raise UnsupportedModel(
            f"a {model.config.model_type} model has {len(names)} lists of layers ({', '.join(names)}), and noodle cuts "
            "models with exactly one.",
            cure="Choose a model of another type.",
        )
    return names[0]


def _remove_foreign_modules(model: Any, start_layer: int, end_layer: int) -> None:
    base, config = base_model_of(model), model.config
    layer_count: int = config.num_hidden_layers
    list_name = layer_list_name(model)
    names = [name for name, _ in base.named_children()]
    before, after = _around_layers(base, names, list_name)
    setattr(base, list_name, _Layers(list(getattr(base, list_name))[start_layer:end_layer]))
    for each in {id(config): config, id(base.config): base.config}.values():
        each.num_hidden_layers = end_layer - start_layer
        # the only per-layer list that transformers reads while computing, indexed by place in the list
        if getattr(each, "layer_types", None):
            each.layer_types = list(each.layer_types)[start_layer:end_layer]
    learned_positions = LEARNED_POSITIONS.get(config.model_type, "")
    if start_layer > 0:
        if hasattr(base, "embedding_multiplier"):  # Granite's models scale whatever they are given
            base.embedding_multiplier = 1.0
        for name in before:
            if name == learned_positions:
                setattr(base, name, _NoPositions(torch.get_default_dtype()))
            else:
                setattr(base, name, _Identity())
    if end_layer < layer_count:
        for name in after:
            setattr(base, name, _Identity())
        for name, child in model.named_children():
            if child is not base:
                setattr(model, name, _Identity())
    # a slice with both ends lets transformers tie them; otherwise each end has its own copy of the tensor
    model.tied_keys_of_whole_model = dict(model.all_tied_weights_keys)
    if not (start_layer == 0 and end_layer == layer_count):
        model.all_tied_weights_keys = {}
        base.all_tied_weights_keys = {}


def _around_layers(base: Any, names: list[str], list_name: str) -> tuple[list[str], list[str]]:
    """Children of the base model that belong to the first stage, and those that belong to the last.

    Taken from transformers' pipeline plan or, in a family without one, from the order of the children with weights.
    Children without weights (rotary, dropout) are on every stage.
    """
    plan = [name for name in (getattr(base.config, "base_model_pp_plan", None) or {}) if name in names]
    if not plan:
        plan = [name for name in names if next(getattr(base, name).parameters(), None) is not None]
    place = plan.index(list_name)
    return plan[:place], plan[place + 1 :]
