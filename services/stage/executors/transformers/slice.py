"""A slice computed by transformers' modules with noodle's KV rows (design D4).

One thread at a time computes with a slice.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from noodle.errors import GenerationFailed
from noodle.wire.frames import ActivationTensor
from services.stage.executors.base import PackedBatch, SliceOutput, Span, checked_hidden_states
from services.stage.executors.kv_cache import KvCache
from services.stage.executors.transformers import attention
from services.stage.executors.transformers.attention import AttentionSpan, StepSpans
from services.stage.executors.transformers.kv_rows import SessionRows
from services.stage.executors.transformers.linear import weight_bytes
from services.stage.executors.transformers.model_cut import base_model_of, with_computed_layers

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_NAMES = {torch_dtype: name for name, torch_dtype in DTYPES.items()}


class TransformersSlice(KvCache[SessionRows]):
    """Layers [start_layer, end_layer) of one model; a `ModelSlice`."""

    def __init__(
        self,
        model: Any,
        *,
        start_layer: int,
        end_layer: int,
        layer_count: int,
        device: str,
        bytes_read: int,
        weights_note: str = "",
    ) -> None:
        super().__init__(SessionRows, reserves_upfront=torch.device(device).type != "cpu")
        self.start_layer = start_layer
        self.end_layer = end_layer
        self.is_first = start_layer == 0
        self.is_last = end_layer == layer_count
        self.hidden_size = int(model.config.hidden_size)
        self.vocab_size = int(model.config.vocab_size)
        self.bytes_read = bytes_read  # from disk, as stored there
        self.weights_note = weights_note
        self._base = base_model_of(model)
        self._head, self._computed = with_computed_layers(model)
        self._device = torch.device(device)
        self._torch_dtype: torch.dtype = model.dtype
        self.dtype = _NAMES[self._torch_dtype]
        self.weight_bytes = weight_bytes(model)
        self._base_output: Any = None  # of the last step, on the last stage
        self._step_spans = StepSpans()
        attention.attach(model, self._step_spans)
        self.kv_bytes_per_token = self._measured_kv_bytes_per_token()

    def forward(self, batch: PackedBatch) -> SliceOutput:
        """See ModelSlice. Raises StepRefused without room for KV rows, PositionGap if earlier rows are missing."""
        total_tokens = sum(span.token_count for span in batch.spans)
        inputs = self._inputs(batch)
        attention_spans = self._attention_spans(batch.spans)
        self._step_spans.spans = attention_spans
        try:
            with torch.inference_mode():
                output = self._compute(inputs, batch)
        except torch.OutOfMemoryError as error:
            raise GenerationFailed(
                f"{self._device} ran out of memory in a step of {total_tokens} tokens.",
                cure="Give this stage fewer layers (NOODLE_SPLIT), less KV cache (NOODLE_KV_BYTES) or smaller steps "
                "(NOODLE_STEP_TOKENS).",
            ) from error
        finally:
            self._step_spans.spans = []
        for span in attention_spans:
            span.rows.length = max(span.rows.length, span.first_position + span.end - span.begin)
        return output

    @torch.inference_mode()
    def copy_rows(self, from_session_id: str, to_session_id: str, tokens: int, reserve_tokens: int) -> None:
        super().copy_rows(from_session_id, to_session_id, tokens, reserve_tokens)

    def logits_of(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """See ModelSlice. The model's own head computes them, with its soft caps and scales."""
        if self._base_output is None or not len(rows):
            return np.empty((0, self.vocab_size), np.float32)
        with torch.inference_mode():
            chosen = self._base_output.last_hidden_state[:, torch.from_numpy(rows).to(self._device)]
            self._computed.output = type(self._base_output)(**{**self._base_output, "last_hidden_state": chosen})
            try:
                logits = self._head(inputs_embeds=chosen, use_cache=False).logits[0]
            finally:
                self._computed.output = None
        return np.asarray(logits.float().cpu().numpy(), np.float32)

    def set_threads(self, threads: int) -> None:
        torch.set_num_threads(threads)

    def synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _attention_spans(self, spans: tuple[Span, ...]) -> list[AttentionSpan]:
        """Rows of each span on the packed axis and in the cache; nothing is reserved if one is refused."""
        attention_spans: list[AttentionSpan] = []
        begin = 0
        for rows, span in zip(self.open_spans(spans), spans, strict=True):
            attention_spans.append(AttentionSpan(rows, begin, begin + span.token_count, span.first_position))
            begin += span.token_count
        return attention_spans

    def _compute(self, inputs: dict[str, Any], batch: PackedBatch) -> SliceOutput:
        positions = [np.arange(span.first_position, span.first_position + span.token_count) for span in batch.spans]
        inputs["position_ids"] = torch.from_numpy(np.concatenate(positions))[None].to(self._device)
        inputs["use_cache"] = False
        self._base_output = None  # frees the last step's hidden states first
        output = self._base(**inputs)
        if not self.is_last:
            return SliceOutput(hidden_states=to_wire(output.last_hidden_state[0]))
        self._base_output = output
        return SliceOutput(logits=self.logits_of(batch.logits_rows))

    def _inputs(self, batch: PackedBatch) -> dict[str, Any]:
        if self.is_first and batch.token_ids is not None:
            return {"input_ids": torch.from_numpy(batch.token_ids).to(self._device)[None]}
        hidden_states = from_wire(checked_hidden_states(self, batch)).to(self._device, self._torch_dtype)
        return {"inputs_embeds": hidden_states[None]}

    def _measured_kv_bytes_per_token(self) -> int:
        """Bytes of one session's token in all layers, measured by computing one."""
        span = Span("warm-up", first_position=0, token_count=1, reserve_tokens=1)
        no_rows = np.zeros(0, np.int64)
        if self.is_first:
            batch = PackedBatch((span,), no_rows, token_ids=np.zeros(1, np.int64))
        else:
            zeros = torch.zeros(1, self.hidden_size, dtype=self._torch_dtype)
            batch = PackedBatch((span,), no_rows, hidden_states=to_wire(zeros))
        self.forward(batch)
        measured_bytes = self.bytes_allocated()
        self.release(span.session_id)
        return measured_bytes


def to_wire(tensor: torch.Tensor) -> ActivationTensor:
    """A tensor for a hop; on a CPU its bytes are not copied."""
    tensor = tensor.detach().cpu().contiguous()
    data = tensor.view(torch.uint8).numpy().data.cast("B")
    return ActivationTensor(_NAMES[tensor.dtype], tuple(tensor.shape), data)


def from_wire(tensor: ActivationTensor) -> torch.Tensor:
    """A received tensor on the CPU."""
    data = tensor.data
    # torch shares memory only with writable buffers
    buffer = bytearray(data) if data.readonly else data
    return torch.frombuffer(buffer, dtype=DTYPES[tensor.dtype]).view(tensor.shape)
