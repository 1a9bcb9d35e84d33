"""Measures how fast a device computes the parts of any model's layers by ggml, with the kernels that serve.

The numbers are kept: stages on one machine measure one after another, and later ones measure only further types.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from noodle.model.ggml_types import GGML_TYPES
from noodle.wire.messages import SamplingParameters
from services.stage.executors.ggml.backend import GgmlDevice, GgmlLibrary, load_ggml
from services.stage.executors.ggml.graph import GgmlCalls, GraphMemory, SpanRows
from services.stage.executors.ggml.kernels.attention import (
    FlashAttentionKernel,
    LayerAttention,
    flash_attention_kernel,
)
from services.stage.executors.ggml.kernels.products import packed_weights
from services.stage.executors.ggml.kernels.threads import GraphThreads
from services.stage.executors.ggml.weights import GgmlTensors, TensorLayout, WeightBlock, own_memory
from services.stage.selection.benchmark import FILE_NAME, MeasureProgress, keep, one_at_a_time, read_kept
from services.stage.selection.layer_costs import ROW_COUNTS, MachineSpeed
from services.stage.worker.sampler import sample

FEATURES, OUTPUTS = 2048, 4096  # of a measured weight
READ_BYTES = 96 << 20  # of weights in a row for few rows: more than a processor's caches hold
LEAST_ROUNDS, MOST_ROUNDS = 3, 8  # of each graph; the fastest counts, since other load only adds time
ROUNDS_SECONDS = 0.1  # for the rounds beyond the least
FILL = 0x2C  # any byte that gives small normal numbers in every type
HEADS, KV_HEADS, HEAD_DIM, KEYS = 16, 4, 64, 1024  # of a measured attention
F32, F16 = 0, 1  # ggml's numbers
CHAIN = 64  # operations one after the other
VOCABULARY = 1 << 15
SAMPLING = SamplingParameters(temperature=0.8, top_p=0.95)
FEWER_THREADS_SHARE = 0.95  # half the threads are taken below this share of the seconds of all threads


def machine_speed(
    types: Sequence[str], *, key: str, device_name: str, threads: int, cache_dir: Path, progress: MeasureProgress
) -> MachineSpeed:
    """The speed of a device of ggml's for weights of these types, kept under `key` or measured now.

    `threads` are the most of a CPU: half of them compute where that is faster, since two threads that share a core may
    slow each other down. A type that the device does not multiply is left out. Raises NotWritable if `cache_dir` cannot
    be made, StartError if another stage measures for too long.
    """
    path = cache_dir / FILE_NAME

    def kept() -> MachineSpeed | None:
        found = read_kept(path, key, MachineSpeed)
        return found if found is not None and found.is_plausible else None

    known = kept()
    if known is not None and all(name in known.product_seconds for name in types):
        return known
    with one_at_a_time(cache_dir, progress):
        known = kept()
        products = dict(known.product_seconds) if known is not None else {}
        with closing(SpeedMeter(device_name, known.threads if known is not None else threads)) as meter:
            lacking = [name for name in types if name not in products and meter.multiplies_by(name)]
            if known is None and lacking and meter.is_cpu:
                threads, products[lacking[0]] = _fastest_threads(meter, lacking[0], threads)
            for index, name in enumerate(lacking):
                progress(index / len(lacking), f"measuring this machine's speed with {name}, to divide the model")
                if name not in products:
                    products[name] = meter.product_seconds(name)
            known = known or meter.others(threads, {})
        speed = msgspec.structs.replace(known, product_seconds=products)
        if lacking:
            keep(path, key, speed)
    progress(1.0, "measured")
    return speed


def _fastest_threads(meter: SpeedMeter, type_name: str, threads: int) -> tuple[int, tuple[float, ...]]:
    """All threads or half of them, and the seconds of products with them."""
    seconds = meter.product_seconds(type_name)
    half = threads // 2
    if half:
        meter.set_threads(half)
        by_half = meter.product_seconds(type_name)
        if _token_seconds(by_half) < FEWER_THREADS_SHARE * _token_seconds(seconds):
            return half, by_half
        meter.set_threads(threads)
    return threads, seconds


def _token_seconds(product_seconds: tuple[float, ...]) -> float:
    """Seconds of a new token and of one of a prompt, for each byte."""
    return product_seconds[0] + product_seconds[-1] / ROW_COUNTS[-1]


class SpeedMeter:
    """Times graphs on one of ggml's devices; `close` frees what it holds."""

    def __init__(self, device_name: str, threads: int) -> None:
        self._library: GgmlLibrary = load_ggml()
        self._ggml = GgmlCalls(self._library.module)
        self._device = GgmlDevice(self._ggml, device_name, self._library.backend(threads, device_name))
        self._threads = GraphThreads(self._device, threads)
        self._kernels = packed_weights(self._ggml) if self._device.is_host else None
        kernel = flash_attention_kernel(self._ggml, F16, heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM)
        self._attention_kernel = kernel if self._device.is_host else None
        self._memory = own_memory(READ_BYTES)
        self._memory[:] = FILL
        self._inputs: list[tuple[int, npt.NDArray[Any]]] = []  # of the graph that is being built

    @property
    def is_cpu(self) -> bool:
        return self._device.is_host

    def multiplies_by(self, type_name: str) -> bool:
        """Whether this device multiplies by weights of this type."""
        return self._device.multiplies(GGML_TYPES[type_name].number)

    def set_threads(self, threads: int) -> None:
        self._threads.set(threads)

    def product_seconds(self, type_name: str) -> tuple[float, ...]:
        """Seconds for each byte of a weight of this type in a product with each of ROW_COUNTS rows."""
        kind = GGML_TYPES[type_name]
        byte_count = kind.byte_count(FEATURES * OUTPUTS)
        count = max(1, READ_BYTES // byte_count)
        layouts = tuple(
            TensorLayout(str(index), kind.number, (FEATURES, OUTPUTS), index * byte_count, byte_count)
            for index in range(count)
        )
        loaded = GgmlTensors(self._device, {"weights": WeightBlock(layouts, self._memory)})
        weights = list(loaded.by_block["weights"].values())
        try:
            used = (count, max(1, count // 2), 1)  # by ROW_COUNTS: a chunk's products do not wait for memory
            return tuple(
                self._seconds(partial(self._products, weights[:most], rows)) / (most * byte_count)
                for rows, most in zip(ROW_COUNTS, used, strict=True)
            )
        finally:
            loaded.close()

    def others(self, threads: int, product_seconds: dict[str, tuple[float, ...]]) -> MachineSpeed:
        """The speed of everything else, with these products."""
        chunk = ROW_COUNTS[2]
        return MachineSpeed(
            threads=threads,
            product_seconds=product_seconds,
            operation_seconds=self._seconds(partial(self._chain, 1)) / CHAIN,
            item_seconds=self._seconds(partial(self._chain, chunk)) / (CHAIN * FEATURES * chunk),
            key_seconds=self._seconds(partial(self._attention, 1, KEYS)) / (HEADS * HEAD_DIM * KEYS),
            chunk_key_seconds=self._seconds(partial(self._attention, chunk, chunk))
            / (HEADS * HEAD_DIM * chunk * (chunk + 1) / 2),
            sample_seconds=_sample_seconds() / VOCABULARY,
        )

    def close(self) -> None:
        self._ggml.ggml_backend_free(self._device.backend)

    def _seconds(self, build: Callable[[GraphMemory], Sequence[int]]) -> float:
        """Seconds of a graph; `build` adds its operations and returns its results."""
        with self._graph(build) as memory:
            return _least_seconds(partial(memory.compute, self._threads.compute))

    @contextmanager
    def _graph(self, build: Callable[[GraphMemory], Sequence[int]]) -> Iterator[GraphMemory]:
        memory = GraphMemory(self._device, 512)
        try:
            for tensor in build(memory):
                self._ggml.ggml_build_forward_expand(memory.graph, tensor)
            memory.allocate()
            for tensor, values in self._inputs:
                memory.upload(tensor, values)
            yield memory
        finally:
            self._inputs.clear()
            memory.close()

    def _input(self, memory: GraphMemory, *sizes: int, value: float = 0.5, dtype: type[Any] = np.float32) -> int:
        """An input full of one value: what memory happens to hold may be numbers that take far longer."""
        kind = F16 if dtype is np.float16 else F32
        made = int(getattr(self._ggml, f"ggml_new_tensor_{len(sizes)}d")(memory.context, kind, *sizes))
        self._inputs.append((made, np.full(sizes, value, dtype)))
        return memory.persist(made)

    def _products(self, weights: Sequence[int], count: int, memory: GraphMemory) -> list[int]:
        rows = self._input(memory, FEATURES, count)
        kernels = self._kernels
        if kernels is None or not kernels.multiplies(weights[0]):
            memory.ggml_work = 1  # all of it: ggml's threads compute
            return [int(self._ggml.ggml_mul_mat(memory.context, weight, rows)) for weight in weights]
        tiles = kernels.tiles(memory.context, rows, kernels.tiles_of(weights[0]))
        return [kernels.product(memory.context, weight, tiles) for weight in weights]

    def _chain(self, count: int, memory: GraphMemory) -> list[int]:
        added = self._input(memory, FEATURES, count)
        total = added
        for _ in range(CHAIN):
            total = int(self._ggml.ggml_add(memory.context, total, added))
        return [total]

    def _attention(self, count: int, keys: int, memory: GraphMemory) -> list[int]:
        if self._attention_kernel is not None:
            return [self._own_attention(self._attention_kernel, count, keys, memory)]
        memory.ggml_work = 1
        query = self._input(memory, HEAD_DIM, count, HEADS)
        key, value = (self._input(memory, HEAD_DIM, keys, KV_HEADS, dtype=np.float16) for _ in range(2))
        mask = None if count == 1 else self._input(memory, keys, count, value=0.0, dtype=np.float16)
        factors: tuple[Any, ...] = (mask, 0.1, 0.0, 0.0)
        return [int(self._ggml.ggml_flash_attn_ext(memory.context, query, key, value, *factors))]

    def _own_attention(self, kernel: FlashAttentionKernel, count: int, keys: int, memory: GraphMemory) -> int:
        query, key, value = (self._input(memory, HEAD_DIM, heads, count) for heads in (HEADS, KV_HEADS, KV_HEADS))
        area_bytes = 2 * HEAD_DIM * KV_HEADS * keys
        self._spans = kernel.new_spans(1)
        self._spans.write([SpanRows(int(self._memory.ctypes.data), 0, area_bytes, keys - count, count)])
        layer = LayerAttention(0, 1, scale=0.1)
        return kernel.attend(memory.context, self._spans, layer, query=query, key=key, value=value)


def _least_seconds(run: Callable[[], object]) -> float:
    """Seconds of the fastest round, after one that warms up."""
    run()
    rounds: list[float] = []
    while len(rounds) < LEAST_ROUNDS or (len(rounds) < MOST_ROUNDS and sum(rounds) < ROUNDS_SECONDS):
        start_seconds = time.perf_counter()
        run()
        rounds.append(time.perf_counter() - start_seconds)
    return min(rounds)


def _sample_seconds() -> float:
    logits = np.random.default_rng(0).standard_normal(VOCABULARY, np.float32)
    return _least_seconds(lambda: sample(logits, SAMPLING, 0, False))
