"""Times the unsplit model under transformers' generate(), the control of `noodle bench`.

A process (`python -m services.stage.tools.control`) that exchanges JSON lines (noodle/cluster/measuring.py): it
receives a ControlQuestion and a ControlRun for each run, and answers each with a ControlLine. It ends with its standard
input.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from noodle.cluster.measuring import ControlLine, ControlQuestion, ControlReady, ControlRun, ControlTimes, ProcessError
from noodle.config.cores import usable_cores
from noodle.errors import GenerationFailed, NoodleError
from services.stage.tools.reference import write_line
from services.stage.tools.transformers_reference import load_whole_model


def main() -> int:
    """Answer until standard input ends; after an error the last line describes it and the exit status is 1."""
    lines = iter(sys.stdin.buffer)
    try:
        control = Control(msgspec.json.decode(next(lines), type=ControlQuestion))
        write_line(ControlLine(ready=control.ready()))
        for line in lines:
            write_line(ControlLine(times=control.run(msgspec.json.decode(line, type=ControlRun))))
    except NoodleError as error:
        write_line(ControlLine(error=ProcessError(error.message, error.cure)))
        return 1
    return 0


class Control:
    """The unsplit model, loaded with the cores and threads of the question."""

    def __init__(self, question: ControlQuestion) -> None:
        if question.cores:
            os.sched_setaffinity(0, question.cores)  # before torch starts threads, which inherit it
        import torch

        torch.set_num_threads(question.threads)
        self._question = question
        try:
            self._model = load_whole_model(
                Path(question.folder), question.dtype, question.context_length, question.device
            )
        except torch.OutOfMemoryError as error:
            raise _no_memory(question.device) from error

    def ready(self) -> ControlReady:
        import torch
        import transformers

        from services.stage.selection.device import device_name

        return ControlReady(
            device=self._question.device,
            device_name=device_name(self._question.device, "transformers"),
            dtype=self._question.dtype,
            threads=torch.get_num_threads(),
            cores=usable_cores(),
            weight_bytes=int(self._model.get_memory_footprint(return_buffers=False)),
            torch_version=str(torch.__version__),
            transformers_version=str(transformers.__version__),
        )

    def run(self, run: ControlRun) -> ControlTimes:
        """Generate greedily from prompts of equal length as one batch, past any end of text.

        Raises GenerationFailed if the device runs out of memory, or the number of tokens is wrong.
        """
        import torch

        ids = torch.tensor(run.prompts, device=self._question.device)
        try:
            with torch.inference_mode():
                arrivals = _Arrivals()
                self._model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=run.new_tokens,
                    do_sample=False,
                    temperature=None,
                    top_p=None,
                    top_k=None,
                    eos_token_id=None,
                    pad_token_id=0,
                    streamer=arrivals,
                )
        except torch.OutOfMemoryError as error:
            raise _no_memory(self._question.device) from error
        if len(arrivals.seconds) != run.new_tokens:
            raise GenerationFailed(f"generate() made {len(arrivals.seconds)} tokens instead of {run.new_tokens}.")
        return ControlTimes(tuple(arrivals.seconds))


class _Arrivals:
    """A streamer for generate(): records the time of each token of the batch."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start_seconds = time.perf_counter()
        self._is_prompt = True  # which generate() puts first

    def put(self, _tokens: Any) -> None:
        if self._is_prompt:
            self._is_prompt = False
        else:
            self.seconds.append(time.perf_counter() - self._start_seconds)

    def end(self) -> None:
        """Called by generate() after the last token."""


def _no_memory(device: str) -> GenerationFailed:
    return GenerationFailed(
        f"The unsplit model does not fit into the memory of {device} beside the cluster's stages.",
        cure="Use --no-control: a model that fits no machine whole is what the cluster is for.",
    )


if __name__ == "__main__":
    sys.exit(main())
