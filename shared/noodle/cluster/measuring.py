"""Messages between commands (`noodle up`, `bench`, `verify`, `profile`) and the processes that they start: JSON lines.

A line from a process has exactly one of its fields set.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from noodle.cluster.transfer import TransferClock


class ProcessError(Struct, frozen=True):
    """Why a process cannot do its work; it ends after this line."""

    message: str
    cure: str = ""


class StoreProgress(Struct, frozen=True):
    """What the model store is doing; a total of 0 is unknown."""

    activity: Literal["download", "convert", "wait"]
    detail: str
    bytes_done: int = 0
    bytes_total: int = 0

    def text(self, clock: TransferClock) -> str:
        """One line for a terminal, with the rate and the time left by a clock that saw the earlier ones."""
        done = f", {clock.text(self.bytes_done, self.bytes_total)}" if self.bytes_total else ""
        return f"{self.activity}: {self.detail}{done}"


class ControlQuestion(Struct, frozen=True):
    """The first line to the control: the unsplit model and its resources."""

    folder: str
    device: str  # "cpu", "cuda" or one that ggml alone has
    dtype: str  # float32, float16 or bfloat16
    threads: int
    cores: tuple[int, ...]  # by their system numbers; empty: all of the process
    context_length: int  # of the cluster; it determines the frequencies of longrope


class ControlRun(Struct, frozen=True):
    """A further line: prompts of one length, to continue at the same time."""

    prompts: tuple[tuple[int, ...], ...]
    new_tokens: int


class ControlReady(Struct, frozen=True):
    """The model is loaded."""

    device: str
    device_name: str
    dtype: str
    threads: int
    cores: int
    weight_bytes: int
    torch_version: str
    transformers_version: str


class ControlTimes(Struct, frozen=True):
    """One run: seconds from its start to each new token of all prompts."""

    arrivals_seconds: tuple[float, ...]


class ControlLine(Struct, frozen=True, omit_defaults=True):
    """A line from the control."""

    ready: ControlReady | None = None
    times: ControlTimes | None = None
    error: ProcessError | None = None


class GreedyAnswer(Struct, frozen=True):
    """The cluster's greedy answer to one prompt."""

    prompt: str
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]  # of each of these tokens


class ReferencePart(Struct, frozen=True):
    """Consecutive layers that the cluster computes in one way; a stage's formats as its plan names them."""

    start_layer: int
    end_layer: int
    executor: str
    weights: str
    kv_dtype: str
    dtype: str


class ReferenceQuestion(Struct, frozen=True):
    """The line to a reference: the answers to compare, and the unsplit model."""

    model: str  # a path: a GGUF file or a folder
    context_length: int  # of the cluster's plan, which fixes longrope's frequencies
    answers: tuple[GreedyAnswer, ...]
    parts: tuple[ReferencePart, ...] = ()  # all layers in order, for the reference by the cluster's own executors
    dtype: str = "float32"  # of transformers' reference: float32, float16 or bfloat16
    threads: int = 0  # 0: one for each core
    cache_dir: str = ""  # of weights that were laid out before; empty: none


class Difference(Struct, frozen=True):
    """A token of the cluster that is not the reference's most likely one."""

    index: int  # among the new tokens of its prompt, from 0
    token_id: int
    best_token_id: int
    logit_gap: float  # from the reference's best logit down to that of the cluster's token; never negative
    two_best_gap: float  # between the reference's two best logits; at most logit_gap


class PromptResult(Struct, frozen=True):
    """One prompt, with the cluster's tokens fed to the unsplit model."""

    prompt_tokens: int
    tokens: int
    largest_logprob_error: float
    differences: tuple[Difference, ...] = ()


class ReferenceLine(Struct, frozen=True, omit_defaults=True):
    """A line from the reference."""

    compared: int | None = None  # prompts so far
    results: tuple[PromptResult, ...] | None = None
    unable: str = ""  # why this reference does not compute this model; it ends after this line
    error: ProcessError | None = None


class ProfileQuestion(Struct, frozen=True):
    """The line to the profile: what to measure on this machine."""

    folder: str
    device: str  # auto (the CPU and the card, if there is one), cpu or cuda
    dtype: str  # auto: the default of each device
    threads: int  # maximum of the CPU; 0: one per core
    step_tokens: int  # maximum tokens of one step
    cache_dir: str  # stages lock it while they measure
    is_quick: bool


class ProfileProgress(Struct, frozen=True):
    """Progress from 0 to 1, and the current work."""

    fraction: float
    text: str


class DecodePoint(Struct, frozen=True):
    """A step of one new token per session."""

    sessions: int
    kv_tokens: int  # earlier rows of each session
    layer_seconds: float  # of one layer
    rounds: int


class PrefillPoint(Struct, frozen=True):
    """A step of one first prompt chunk per session."""

    sessions: int
    chunk_tokens: int  # of each session
    layer_seconds: float  # of one layer, for all chunks together
    rounds: int


class PartPoint(Struct, frozen=True):
    """Embedding of tokens, or head and sampling of rows; 0 seconds: below the noise of a step."""

    tokens: int
    seconds: float
    rounds: int


class ThreadsProfile(Struct, frozen=True):
    """A device with a number of CPU threads."""

    threads: int
    decode: tuple[DecodePoint, ...] = ()
    prefill: tuple[PrefillPoint, ...] = ()
    embedding: tuple[PartPoint, ...] = ()
    head: tuple[PartPoint, ...] = ()


class DeviceProfile(Struct, frozen=True):
    """One device, measured with layers as a stage loads them."""

    device: str
    device_name: str
    dtype: str  # executor and weights
    dtype_reason: str
    free_bytes: int  # before loading
    free_source: str
    layer_bytes: int  # weights of one layer in memory
    kv_bytes_per_token: int  # of one session in one layer
    threads: tuple[ThreadsProfile, ...]  # the most threads first


class MachineProfile(Struct, frozen=True):
    """Measurements of this machine for one model."""

    model_digest: str
    model_type: str
    layer_count: int
    hidden_size: int
    vocab_size: int
    context_length: int
    executor_version: str
    cores: int
    seconds: float  # of the measurement
    devices: tuple[DeviceProfile, ...]
    notes: tuple[str, ...]  # what was not measured, and why


class ProfileLine(Struct, frozen=True, omit_defaults=True):
    """A line from the profile."""

    progress: ProfileProgress | None = None
    profile: MachineProfile | None = None
    error: ProcessError | None = None
