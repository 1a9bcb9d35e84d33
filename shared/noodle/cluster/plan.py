"""The plan and its inputs: the model's shape, and each stage's report and state.

Their owner writes them and the others read them, through Valkey: a stage writes MachineReport and StageState, the
planner Plan and PlannerState (design D14).
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct, field

from noodle.wire.messages import ChainLink

MINIMUM_SESSION_TOKENS = 16  # smallest useful context, and smallest room for KV rows: a short prompt and its answer
PREFILL_HOP_TOKENS = 32  # a step of this many tokens contains a prompt; decode steps at home are smaller

Source = Literal["measured", "assumed", "configured"]  # the origin of a number (design D8)


class ModelShape(Struct, frozen=True):
    """What the planner needs to know of a model; bytes are those of the weight files."""

    digest: str  # of config and weights; the same on every machine
    name: str
    model_type: str
    layer_count: int
    hidden_size: int
    vocab_size: int
    context_length: int  # longest session of the plan
    stored_item_bytes: float  # mean bytes of one weight in the files
    layer_bytes: tuple[int, ...]  # [layer_count]
    embedding_bytes: int  # token (and learned position) embeddings: first stage
    head_bytes: int  # norm and language model head: last stage; includes a tied head
    kv_items_per_token_per_layer: int  # K and V items of one token in one layer


class FormatSeconds(Struct, frozen=True):
    """What a machine would take for the model with its weights in another format, as in MachineReport."""

    decode_layer_seconds: float
    prefill_layer_seconds_per_token: float
    head_decode_seconds: float
    layer_weight_bytes: float


class MachineReport(Struct, frozen=True):
    """A stage's measurements of its machine and device, for one model."""

    stage_id: int
    machine: str  # stages of one machine share its memory
    url: str  # of this stage, for the other processes
    boot_id: str
    noodle_version: str
    model_digest: str
    device: str  # "cpu", "cuda" or one that ggml alone has
    device_name: str
    dtype: str
    threads: int
    free_bytes: int  # of the memory for layers and KV rows
    decode_layer_seconds: float  # one layer, one token
    prefill_layer_seconds_per_token: float  # one layer, per token of a chunk
    head_decode_seconds: float  # norm, head and sampling of one row
    source: Source = "measured"
    leaving: bool = False  # its layers are to move to the other stages
    executor: str = "transformers"
    weights: str = ""  # names of noodle.model.formats; empty, like kv_dtype: as `dtype`
    kv_dtype: str = ""
    layer_weight_bytes: float = 0.0  # measured for one layer; 0: computed from `weights`
    executor_version: str = ""
    choice: str = ""  # why this was chosen, in words
    other_formats: dict[str, FormatSeconds] = {}  # by values of NOODLE_WEIGHTS, of those that can be predicted here
    link_bytes_per_second: float = 0.0  # from the coordinator's machine; 0: not measured
    batched_layer_seconds: float = 0.0  # one layer, per token of a step of several sessions; 0: not measured
    batched_head_seconds: float = 0.0  # head, per row of such a step


class StageAssignment(Struct, frozen=True):
    """Layers [start_layer, end_layer) on one stage."""

    stage_id: int
    machine: str
    url: str
    start_layer: int
    end_layer: int
    dtype: str
    weight_bytes: int = 0  # as the planner expects
    decode_seconds: float = 0.0  # predicted for one token
    executor: str = "transformers"
    weights: str = ""  # as in the stage's report
    kv_dtype: str = ""
    activation_dtype: str = field(default="", name="hop_dtype")  # of the hidden states it sends; empty: as computed
    prefill_activation_dtype: str = field(default="", name="hop_prefill_dtype")  # of prompts; empty: the same
    hop_token_seconds: float = 0.0  # predicted for sending one token to the next stage

    def activation_dtype_for(self, tokens: int) -> str:
        if self.prefill_activation_dtype and tokens >= PREFILL_HOP_TOKENS:
            return self.prefill_activation_dtype
        return self.activation_dtype or self.dtype

    @property
    def activation_dtypes(self) -> tuple[str, ...]:
        """Every dtype that the next stage must accept."""
        return tuple(dict.fromkeys((self.activation_dtype_for(1), self.activation_dtype_for(PREFILL_HOP_TOKENS))))


class Plan(Struct, frozen=True):
    """The layers of each stage, in pipeline order; `version` only grows."""

    version: int
    model_digest: str
    layer_count: int
    hidden_size: int
    vocab_size: int
    context_length: int
    stages: tuple[StageAssignment, ...]
    reason: str = ""  # for this split, in one sentence

    def index_of(self, stage_id: int) -> int | None:
        """The position of a stage in the pipeline, None when it has no layers."""
        return next((index for index, stage in enumerate(self.stages) if stage.stage_id == stage_id), None)


StagePhase = Literal["starting", "measuring", "waiting", "loading", "ready", "failed"]


class StageState(Struct, frozen=True):
    """A stage's heartbeat: its phase, and the plan version that it is ready for."""

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
    kv_reserves_upfront: bool = field(default=False, name="kv_counts_reservations")  # as cards do
    sessions: int = 0
    weight_bytes: int = 0
    device: str = ""  # this and the next two once it has measured
    device_name: str = ""
    threads: int = 0
    executor: str = ""  # this and the next one once layers are loaded
    weights: str = ""
    choice: str = ""  # why these were chosen, in words
    outbox_bytes: int = 0  # activations kept until the next stage fetches them
    transport: str = "direct"  # NOODLE_TRANSPORT, which must be the coordinator's too
    link: ChainLink | None = None  # to the next stage, for a coordinator without a connection


class PlannerState(Struct, frozen=True):
    """The planner's phase, for /health and `noodle status`."""

    phase: Literal["starting", "waiting", "planned", "failed"]
    detail: str = ""
    plan_version: int = 0
