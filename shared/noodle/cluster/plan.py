"""The plan, and what it is made of: the model's shape and what each stage says of its machine; values only.

Written once by their owner and read by the others through Valkey: the stage writes MachineReport and StageState,
the planner ModelShape and Plan (design D14).
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct, field

from noodle.model.formats import Quality
from noodle.wire.messages import ChainLink

# Prompt and answer of a session that is of any use: a context, or room for KV rows, that holds less serves nobody.
MINIMUM_SESSION_TOKENS = 16
# A step of so many tokens has a prompt's chunk in it: decode steps of home use have fewer.
PREFILL_HOP_TOKENS = 32

Source = Literal["measured", "assumed", "configured"]  # where a number comes from (design D8)


class ModelShape(Struct, frozen=True):
    """What a planner must know of a model; bytes are as stored in the weight files, per item of `stored_item_bytes`."""

    digest: str  # of config and weights; the same on every machine that serves the same model
    name: str
    model_type: str
    layer_count: int
    hidden_size: int
    vocab_size: int
    context_length: int  # the longest session the plan promises
    stored_item_bytes: float  # mean bytes of one weight item in the files
    layer_bytes: tuple[int, ...]  # [layer_count]
    embedding_bytes: int  # token (and learned position) embeddings: first stage
    head_bytes: int  # norm and language model head: last stage; a tied head is counted here again
    kv_items_per_token_per_layer: int  # K and V items of one token in one layer


class MachineReport(Struct, frozen=True):
    """What one stage measured of the machine and device it runs on, for one model."""

    stage_id: int
    machine: str  # stages with the same machine share its memory
    url: str  # where the other processes reach this stage
    boot_id: str
    noodle_version: str
    model_digest: str
    device: str  # "cpu", "cuda" or one that ggml alone has
    device_name: str
    dtype: str
    threads: int
    free_bytes: int  # of the memory the slice would live in
    decode_layer_seconds: float  # one layer, one token
    prefill_layer_seconds_per_token: float  # one layer, per token of a chunk
    head_decode_seconds: float  # norm, head and sampling of one row
    source: Source = "measured"
    leaving: bool = False  # it wants its layers moved to the others
    executor: str = "transformers"
    weights: str = ""  # as noodle.formats names them; empty, as kv_dtype: as `dtype` says
    kv_dtype: str = ""
    layer_weight_bytes: float = 0.0  # one layer as measured: ggml keeps some tensors in more bits; 0: by the name
    executor_version: str = ""
    quality: Quality | None = None  # of these weights and KV rows, None where they are float32
    choice: str = ""  # what was compared and why this was chosen, in words
    link_bytes_per_second: float = 0.0  # from the coordinator's machine to here; 0: not measured
    batched_layer_seconds: float = 0.0  # one layer, for each token of a step of some sessions; 0: not measured
    batched_head_seconds: float = 0.0  # the head, for each row of such a step


class StageAssignment(Struct, frozen=True):
    """Layers [start_layer, end_layer) on one stage."""

    stage_id: int
    machine: str
    url: str
    start_layer: int
    end_layer: int
    dtype: str
    weight_bytes: int = 0  # what the planner expects the slice to take
    decode_seconds: float = 0.0  # predicted for one token
    executor: str = "transformers"
    weights: str = ""  # as in the stage's report
    kv_dtype: str = ""
    quality: Quality | None = None
    activation_dtype: str = field(default="", name="hop_dtype")  # of the hidden states it sends; empty: as computed
    prefill_activation_dtype: str = field(default="", name="hop_prefill_dtype")  # of prompts; empty: the same
    hop_token_seconds: float = 0.0  # predicted for one token's bytes on the way to the next stage

    def hands_on(self, tokens: int) -> str:
        """The dtype of the hidden states of a step of so many tokens."""
        if self.prefill_activation_dtype and tokens >= PREFILL_HOP_TOKENS:
            return self.prefill_activation_dtype
        return self.activation_dtype or self.dtype

    @property
    def may_hand_on(self) -> tuple[str, ...]:
        """Every dtype that the next stage must take."""
        return tuple(dict.fromkeys((self.hands_on(1), self.hands_on(PREFILL_HOP_TOKENS))))


class Plan(Struct, frozen=True):
    """Who computes which layers, in pipeline order; `version` only grows."""

    version: int
    model_digest: str
    layer_count: int
    hidden_size: int
    vocab_size: int
    context_length: int
    stages: tuple[StageAssignment, ...]
    reason: str = ""  # why this cut, in one sentence

    def index_of(self, stage_id: int) -> int | None:
        """Where in the pipeline a stage stands, or None when it has no layers in this plan."""
        return next((index for index, stage in enumerate(self.stages) if stage.stage_id == stage_id), None)


StagePhase = Literal["starting", "measuring", "waiting", "loading", "ready", "failed"]


class StageState(Struct, frozen=True):
    """A stage's heartbeat: what it does now, and which plan version it is ready for."""

    stage_id: int
    machine: str
    boot_id: str
    phase: StagePhase
    detail: str = ""
    progress: float = 0.0  # of the phase, 0 to 1
    ready_version: int = 0  # 0 is none
    kv_budget_bytes: int = 0
    kv_bytes_per_token: int = 0
    kv_bytes_held: int = 0
    kv_counts_reservations: bool = False  # a session takes all the room that it reserves from its start (a card)
    sessions: int = 0
    weight_bytes: int = 0
    device: str = ""  # "cpu" or "cuda"; this and the next two once it has measured
    device_name: str = ""
    threads: int = 0
    executor: str = ""  # this and the next one once layers are loaded
    weights: str = ""
    choice: str = ""  # why these, in words
    outbox_bytes: int = 0  # activations kept until the next stage fetches them
    transport: str = "direct"  # NOODLE_TRANSPORT of the stage, which must be the coordinator's
    link: ChainLink | None = None  # how it reaches the next stage, for a coordinator that has no connection to ask


class PlannerState(Struct, frozen=True):
    """What the planner does now, for /health and `noodle status`."""

    phase: Literal["starting", "waiting", "planned", "failed"]
    detail: str = ""
    plan_version: int = 0
