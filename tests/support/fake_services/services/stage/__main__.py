from tests.support.fake_service import run

run("stage")
