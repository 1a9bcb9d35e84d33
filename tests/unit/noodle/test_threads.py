"""What a person can mend ends a process with one line; only what nobody expected has a traceback."""

import logging
import os

import pytest

from noodle.errors import ModelNotFound
from noodle.threads import START_REFUSED_EXIT_CODE, start_loop


@pytest.mark.parametrize(("error", "has_traceback"), [(ModelNotFound("a.gguf is gone."), False), (KeyError("x"), True)])
def test_a_thread_that_dies_ends_the_process_with_a_line(error, has_traceback, monkeypatch, capfd, caplog):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr("threading.Thread.start", lambda thread: thread.run())

    def fail():
        raise error

    with caplog.at_level(logging.ERROR):
        start_loop("plans", fail, "stage")
    assert ended == [START_REFUSED_EXIT_CODE]
    assert f"noodle stage: {error if isinstance(error, ModelNotFound) else 'KeyError'}" in capfd.readouterr().err
    assert ("Traceback" in caplog.text) is has_traceback
