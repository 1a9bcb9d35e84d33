from tests.support.processes.fake_service import prepare_model

prepare_model()
