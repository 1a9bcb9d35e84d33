from services.coordinator.models.store import MANIFEST_NAME, served_name


def test_a_folder_of_ones_own_is_called_as_it_is(tmp_path):
    folder = tmp_path / "my-model"
    folder.mkdir()
    assert served_name(folder) == "my-model"


def test_a_converted_folder_is_called_without_its_digest(tmp_path):
    folder = tmp_path / "SmolLM2-135M-Instruct-b179c9523d0e"
    folder.mkdir()
    (folder / MANIFEST_NAME).write_text("{}")
    assert served_name(folder) == "SmolLM2-135M-Instruct"


def test_a_folder_of_the_hub_is_called_by_its_model(tmp_path):
    folder = tmp_path / "models--org--tiny-model" / "snapshots" / "0123abcd"
    folder.mkdir(parents=True)
    assert served_name(folder) == "tiny-model"
