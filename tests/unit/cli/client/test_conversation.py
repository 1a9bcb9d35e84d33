"""Talking with a process that computes: one that answers, gives up, dies, falls silent, or is stopped."""

import os
import signal
import sys
import threading
import time

import pytest

from noodle.cluster.measuring import ControlLine, ControlRun
from noodle.errors import GenerationFailed, RequestTimedOut, StartError
from services.cli.client import conversation
from services.cli.client.conversation import Conversation
from services.cli.local.processes import Interrupted, Signals

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are started as on Linux")
SECONDS = 20.0


@pytest.fixture
def talk(monkeypatch):
    """A conversation with a Python program."""

    def open_talk(program, signals):
        monkeypatch.setattr(conversation, "python_module", lambda _module: (sys.executable, "-c", program))
        return Conversation("a.module", "program", dict(os.environ), signals)

    return open_talk


def test_each_line_is_answered(talk):
    program = """
import sys
for line in sys.stdin:
    print('{"times": {"arrivals_seconds": [%d]}}' % len(line), flush=True)
"""
    with Signals() as signals, talk(program, signals) as process:
        for _ in range(3):
            process.say(ControlRun(((1, 2),), 3))
            assert process.hear(ControlLine, SECONDS).times.arrivals_seconds == (35.0,)


def test_a_program_that_gives_up_is_quoted(talk):
    program = """print('{"error": {"message": "no memory", "cure": "buy some"}}')"""
    with Signals() as signals, talk(program, signals) as process, pytest.raises(StartError) as raised:
        process.hear(ControlLine, SECONDS)
    assert str(raised.value) == "no memory buy some"


def test_a_program_that_dies_is_noticed_also_when_it_was_told_something(talk):
    with Signals() as signals, talk("", signals) as process:
        process._process.wait(SECONDS)
        process.say(ControlRun(((1,),), 3))
        with pytest.raises(GenerationFailed, match="program's process ended"):
            process.hear(ControlLine, SECONDS)


def test_a_silent_program_runs_into_the_timeout_and_is_gone_afterwards(talk, monkeypatch):
    monkeypatch.setattr(conversation, "LOOK_SECONDS", 0.05)
    program = "import time; time.sleep(600)"
    with Signals() as signals, talk(program, signals) as process, pytest.raises(RequestTimedOut, match="said nothing"):
        process.hear(ControlLine, 0.1)
    assert process._process.returncode == -signal.SIGKILL


def test_ctrl_c_ends_the_wait_at_once(talk):
    began_seconds = time.monotonic()
    with Signals() as signals, talk("import time; time.sleep(600)", signals) as process:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(Interrupted):
            process.hear(ControlLine, SECONDS)
    assert time.monotonic() - began_seconds < SECONDS / 2
