"""`noodle quality` on a running cluster: its perplexity is that of the unsplit model."""

import json
import math

import pytest
import tokenizers

from services.cli.quality.command import read_paragraphs
from tests.support.models.real_model import real_model_folder
from tests.support.models.whole_model import WholeModel

pytestmark = pytest.mark.timeout(300)


def test_the_perplexity_of_a_cluster_is_the_unsplit_models(real_cluster):
    done = real_cluster.noodle("quality", "--json")
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)["formats"]
    folder = real_model_folder()
    whole, tokenizer = WholeModel(folder), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    losses = []
    for text in read_paragraphs():
        ids = tokenizer.encode(text).ids
        table = whole.log_probabilities(ids)
        losses += [-float(table[place - 1, ids[place]]) for place in range(1, len(ids))]
    assert found["format"] == "exact"
    assert found["tokens"] == len(losses)
    assert found["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-3)
