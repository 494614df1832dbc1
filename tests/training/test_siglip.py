"""A SigLIP tower through the training script: steps, a checkpoint, an export, and a new run over it."""

from types import SimpleNamespace

import torch
from transformers import AutoModelForImageTextToText

from llava_moslora.export.export import export
from llava_moslora.inference.load import load
from support.training_runs import train


@torch.no_grad()
def same(folder, run) -> None:
    stock, ours = AutoModelForImageTextToText.from_pretrained(folder).eval(), load(run, dtype=torch.float32)
    ids = torch.randint(3, 250, (1, 30), generator=torch.Generator().manual_seed(0))
    ids[:, 1:17] = stock.config.image_token_id
    pixels = torch.randn(1, 3, 34, 34, generator=torch.Generator().manual_seed(1))
    expected = ours.model(input_ids=ids, pixel_values=pixels).logits
    found = stock(input_ids=ids, pixel_values=pixels).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_trained_exported_and_trained_further(parts, tmp_path):
    siglip = SimpleNamespace(**(vars(parts) | {"clip": parts.siglip}))
    train(siglip, tmp_path / "run", gradient_checkpointing=True)
    folder = export(tmp_path / "run", tmp_path / "merged", dtype=torch.float32, prove=False)["hf"]
    same(folder, tmp_path / "run")
    whole = {"model_name_or_path": folder, "vision_tower": None, "pretrain_mm_mlp_adapter": None}
    train(siglip, tmp_path / "again", **whole, image_aspect_ratio="crop")
    same(export(tmp_path / "again", tmp_path / "second", prove=False)["hf"], tmp_path / "again")
