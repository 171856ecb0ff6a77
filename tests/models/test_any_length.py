"""Protects the fields that say how long a text may be: the rows of a table, and what others read of it."""

import json

import pytest
import torch
from tiny_models import build

from fa_transformers.models import FABertConfig, FABertModel
from fa_transformers.models.configuration_fa_bert import ANY_LENGTH


def saved(config: FABertConfig, folder) -> dict:
    config.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("kind", ["periodic", "none"])
def test_a_model_of_any_length_says_so_and_keeps_the_rows_of_its_table(kind, tmp_path):
    config = FABertConfig(position_embedding_type=kind, position_table_size=24)
    fields = saved(config, tmp_path)
    assert (fields["max_position_embeddings"], fields["position_table_size"]) == (ANY_LENGTH, 24)
    loaded = FABertConfig.from_pretrained(tmp_path)
    assert (loaded.max_position_embeddings, loaded.position_table_size) == (ANY_LENGTH, 24)
    assert loaded.to_dict() == config.to_dict() | {"transformers_version": loaded.transformers_version}
    assert ANY_LENGTH > 0, "a number that readers of unsigned integers can read"


def test_a_folder_of_a_table_says_its_rows_alone(tmp_path):
    fields = saved(FABertConfig(max_position_embeddings=24), tmp_path)
    assert fields["max_position_embeddings"] == 24 and "position_table_size" not in fields
    periodic = FABertConfig.from_pretrained(tmp_path, position_embedding_type="periodic")
    assert (periodic.max_position_embeddings, periodic.position_table_size) == (ANY_LENGTH, 24)
    periodic.position_embedding_type = "absolute"
    assert periodic.max_position_embeddings == 24
    periodic.max_position_embeddings = 30
    assert periodic.position_table_size == 30


def test_folders_whose_rows_stand_in_the_old_field_load(tmp_path):
    model = build(FABertConfig, FABertModel, position_embedding_type="periodic", max_position_embeddings=16)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    fields["max_position_embeddings"] = fields.pop("position_table_size")
    path.write_text(json.dumps(fields))
    loaded = FABertModel.from_pretrained(tmp_path)
    ids = torch.arange(1, 41)[None] % 20
    with torch.no_grad():
        assert torch.equal(loaded(ids).last_hidden_state, model(ids).last_hidden_state)
    assert (loaded.config.max_position_embeddings, loaded.config.position_table_size) == (ANY_LENGTH, 16)


def test_fields_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match='`position_table_size` 64: with "absolute" positions .* leave it out'):
        FABertConfig(max_position_embeddings=32, position_table_size=64)
    with pytest.raises(ValueError, match="`position_table_size` is missing"):
        FABertConfig(position_embedding_type="periodic", max_position_embeddings=ANY_LENGTH)
    for bad in (0, -1, 1.5, "2", True, 10**8):
        with pytest.raises(ValueError, match="`position_table_size`"):
            FABertConfig(position_embedding_type="periodic", position_table_size=bad)
