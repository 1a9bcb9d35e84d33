"""What `noodle bench` and `noodle profile` say to the processes that compute for them, and hear: JSON lines, one struct
each; a line from a process has exactly one of its fields set.
"""

from __future__ import annotations

from msgspec import Struct


class ProcessError(Struct, frozen=True):
    """Why a process can not do what was asked; it ends after this line."""

    message: str
    cure: str = ""


class ControlQuestion(Struct, frozen=True):
    """The first line to the control: the unsplit model, and what it may compute with."""

    folder: str
    device: str  # "cpu", "cuda" or one that ggml alone has
    dtype: str  # float32, float16 or bfloat16
    threads: int
    cores: tuple[int, ...]  # by the system's numbers; empty: all that the process has
    context_length: int  # that the cluster promises: it fixes longrope's frequencies


class ControlRun(Struct, frozen=True):
    """Each further line: prompts of one length, to be generated from at once."""

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
    """One run: seconds from its start until each new token was there, of all prompts at once."""

    arrivals_seconds: tuple[float, ...]


class ControlLine(Struct, frozen=True, omit_defaults=True):
    """What the control says."""

    ready: ControlReady | None = None
    times: ControlTimes | None = None
    error: ProcessError | None = None


class ProfileQuestion(Struct, frozen=True):
    """The line to the profile: what is to be measured on this machine."""

    folder: str
    device: str  # auto: the CPU and the card, where there is one; else cpu or cuda
    dtype: str  # auto: each device's own choice
    threads: int  # the most that the CPU computes with; 0: one for each core
    step_tokens: int  # the most tokens of one step: no point has more
    cache_dir: str  # where stages lock the machine while they measure
    is_quick: bool


class ProfileProgress(Struct, frozen=True):
    """How far it is, 0 to 1, and what it does."""

    fraction: float
    text: str


class DecodePoint(Struct, frozen=True):
    """A step of one new token for each of some sessions."""

    sessions: int
    kv_tokens: int  # rows before the new one, of each session
    layer_seconds: float  # of one layer
    rounds: int


class PrefillPoint(Struct, frozen=True):
    """A step of a chunk of a prompt's beginning for each of some sessions."""

    sessions: int
    chunk_tokens: int  # of each session
    layer_seconds: float  # of one layer, for all chunks together
    rounds: int


class PartPoint(Struct, frozen=True):
    """Embedding of so many tokens, or head and sampling of so many rows; 0 seconds: less than a step varies by."""

    tokens: int
    seconds: float
    rounds: int


class ThreadsProfile(Struct, frozen=True):
    """What a device does with so many threads of the CPU."""

    threads: int
    decode: tuple[DecodePoint, ...] = ()
    prefill: tuple[PrefillPoint, ...] = ()
    embedding: tuple[PartPoint, ...] = ()
    head: tuple[PartPoint, ...] = ()


class DeviceProfile(Struct, frozen=True):
    """One device, measured with the slices that a stage would load."""

    device: str
    device_name: str
    dtype: str
    dtype_reason: str
    free_bytes: int  # before anything was loaded
    free_source: str
    layer_bytes: int  # weights of one layer as held in memory
    kv_bytes_per_token: int  # of one session in one layer
    threads: tuple[ThreadsProfile, ...]  # the most threads first


class MachineProfile(Struct, frozen=True):
    """What this machine does for one model."""

    model_digest: str
    model_type: str
    layer_count: int
    hidden_size: int
    vocab_size: int
    context_length: int
    torch_version: str
    transformers_version: str
    cores: int
    seconds: float  # that it took
    devices: tuple[DeviceProfile, ...]
    notes: tuple[str, ...]  # what was left out, and why


class ProfileLine(Struct, frozen=True, omit_defaults=True):
    """What the profile says."""

    progress: ProfileProgress | None = None
    profile: MachineProfile | None = None
    error: ProcessError | None = None
