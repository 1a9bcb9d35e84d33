"""A conversation with a process that answers, gives up, dies, falls silent, or is stopped."""

import os
import signal
import sys
import threading
import time

import pytest

from noodle.cluster.measuring import ControlLine, ControlRun
from noodle.errors import GenerationFailed, RequestTimedOut, StartError
from services.cli.local import conversation
from services.cli.local.conversation import Conversation
from services.cli.local.processes import Interrupted, Signals

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are started as on Linux")
SECONDS = 20.0


def talk(program, signals):
    """A conversation with a Python program."""
    return Conversation((sys.executable, "-c", program), "program", dict(os.environ), signals)


def test_each_line_is_answered():
    program = """
import sys
for line in sys.stdin:
    print('{"times": {"arrivals_seconds": [%d]}}' % len(line), flush=True)
"""
    with Signals() as signals, talk(program, signals) as process:
        for _ in range(3):
            process.send(ControlRun(((1, 2),), 3))
            assert process.receive(ControlLine, SECONDS).times.arrivals_seconds == (35.0,)


def test_a_program_that_gives_up_is_quoted():
    program = """print('{"error": {"message": "no memory", "cure": "buy some"}}')"""
    with Signals() as signals, talk(program, signals) as process, pytest.raises(StartError) as raised:
        process.receive(ControlLine, SECONDS)
    assert str(raised.value) == "no memory buy some"


def test_a_program_that_dies_is_noticed_also_after_a_line_to_it():
    with Signals() as signals, talk("", signals) as process:
        process.process.wait(SECONDS)
        process.send(ControlRun(((1,),), 3))
        with pytest.raises(GenerationFailed, match="program's process ended"):
            process.receive(ControlLine, SECONDS)


def test_a_silent_program_runs_into_the_timeout_and_is_gone_afterwards(monkeypatch):
    monkeypatch.setattr(conversation, "LOOK_SECONDS", 0.05)
    program = "import time; time.sleep(600)"
    with Signals() as signals, talk(program, signals) as process, pytest.raises(RequestTimedOut, match="sent nothing"):
        process.receive(ControlLine, 0.1)
    assert process.process.returncode == -signal.SIGKILL


def test_ctrl_c_ends_the_wait_at_once():
    began_seconds = time.monotonic()
    with Signals() as signals, talk("import time; time.sleep(600)", signals) as process:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(Interrupted):
            process.receive(ControlLine, SECONDS)
    assert time.monotonic() - began_seconds < SECONDS / 2
