from tests.support.processes.fake_service import run

run("coordinator")
