"""The values that transformers' config classes have by themselves, under their names: one row for each model type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from noodle.model.configs.dense_defaults import DENSE_DEFAULTS
from noodle.model.configs.expert_defaults import EXPERT_DEFAULTS

DEFAULTS: Mapping[str, Mapping[str, Any]] = {**DENSE_DEFAULTS, **EXPERT_DEFAULTS}
