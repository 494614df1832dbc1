"""``--format vision``: what other programs read from the tower's folder."""

import json

from transformers import CLIPVisionModel

from llava_moslora.export.export import export
from support.export_runs import trained_run


def test_the_feature_layer_is_in_the_configuration(parts, tmp_path):
    """llama.cpp's image encoder runs as many layers as ``vision_feature_layer`` says, counted as transformers' hidden
    states, and without it one less than there are in its file, from which its converter took the last already."""
    trained_run(tmp_path / "run", parts.llm, parts.clip, parts.projector)
    folder = export(tmp_path / "run", tmp_path / "out", ["vision"], prove=False)["vision"]
    config = json.loads((folder / "config.json").read_text())
    layers, feature_layer = config["num_hidden_layers"], config["vision_feature_layer"]
    assert layers + feature_layer + 1 == layers - 1 == 2
    assert len(CLIPVisionModel.from_pretrained(folder).encoder.layers) == layers  # and transformers takes no notice
