from tests.support.fake_service import prepare_model

prepare_model()
