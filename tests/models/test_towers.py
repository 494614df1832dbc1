"""A kind of vision tower is one row: with it, another class of transformers is read, assembled and adapted."""

import json

import pytest
import torch
from transformers import ChineseCLIPVisionConfig, ChineseCLIPVisionModel

from llava_moslora.config import TowerAdapter
from llava_moslora.errors import Refusal
from llava_moslora.models.adapt import add_adapters
from llava_moslora.models.towers import KINDS, TowerKind, kind_of, tokens_per_image
from llava_moslora.models.vision import load_vision_tower, read_vision_config
from support.assembled import PATCHES, build, make_batch
from support.settings import adapters
from support.tiny import TOWER, write_clip

ROW = TowerKind("chinese_clip", ChineseCLIPVisionConfig, ChineseCLIPVisionModel, class_tokens=1)


@pytest.fixture
def folder(tmp_path):
    """A small Chinese CLIP tower as transformers saves it, with CLIP's image processor."""
    write_clip(tmp_path)
    torch.manual_seed(5)
    ChineseCLIPVisionModel(ChineseCLIPVisionConfig(**TOWER)).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "chinese_clip_vision_model"
    return tmp_path


def test_a_new_kind_of_tower_is_one_row(folder, parts, monkeypatch):
    monkeypatch.setitem(KINDS, ROW.name, ROW)
    stock = ChineseCLIPVisionModel.from_pretrained(folder).eval()
    tower, _ = load_vision_tower(folder)
    assert type(tower) is ChineseCLIPVisionModel and kind_of(tower.config) is ROW
    assert tokens_per_image(tower.config) == PATCHES
    model, tokenizer = build(parts, clip=folder)
    batch = make_batch(tokenizer)
    model.eval()
    with torch.no_grad():
        patches = stock(batch["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
        features = model.get_image_features(batch["pixel_values"]).pooler_output
        torch.testing.assert_close(torch.stack(list(features)), model.model.multi_modal_projector(patches))
    tuned = add_adapters(model, adapters(TowerAdapter(4, 8), TowerAdapter(2, 4)))
    tuned(**batch).loss.backward()
    trained = [name for name, p in tuned.named_parameters() if "vision_tower" in name and p.grad is not None]
    assert len(trained) == 3 * 6 * 2  # A, W and B of six linears in the two layers that LLaVA reads


def test_without_the_row_it_is_refused(folder):
    with pytest.raises(Refusal, match=r"\[K-TOWER\] .*model_type: not a CLIP or SigLIP .*found chinese_clip_vision"):
        read_vision_config(folder)
