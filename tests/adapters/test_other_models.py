"""Where LLaVA is not: a text-only Llama under HF's Trainer, and a UNet's attention, with nothing but stock PEFT."""

import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments, default_data_collator

from llava_moslora.adapters.config import MosLoraConfig
from support.adapter_models import LINEARS, llama


def test_text_only_llama_under_the_trainer(tmp_path):
    """Learns a sequence by heart through a checkpointed, resumed run; the resumed half repeats the straight one."""
    config = MosLoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules=LINEARS, task_type="CAUSAL_LM")
    ids = torch.arange(1, 33)
    rows = [{"input_ids": ids, "labels": ids}] * 8

    def trainer(folder):
        torch.manual_seed(3)
        model = get_peft_model(llama(), config)
        arguments = TrainingArguments(
            str(folder),
            max_steps=8,
            save_steps=4,
            learning_rate=2e-2,
            per_device_train_batch_size=2,
            logging_steps=1,
            use_cpu=True,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False, "preserve_rng_state": True},
            disable_tqdm=True,
        )
        return Trainer(model, arguments, train_dataset=rows, data_collator=default_data_collator)

    def losses(trainer):
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    straight = trainer(tmp_path / "straight")
    straight.train()
    assert losses(straight)[-1] < losses(straight)[0] - 0.4
    resumed = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight/checkpoint-4"))
    assert losses(resumed) == losses(straight)
    mixer = resumed.model.base_model.model.model.layers[0].mlp.up_proj.lora_mixer["default"]
    assert isinstance(mixer, nn.Linear)

    straight.save_model(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(llama(), tmp_path / "adapter").eval()
    straight.model.eval()
    assert torch.equal(again(input_ids=ids[None]).logits, straight.model(input_ids=ids[None]).logits)
    tokens = again.generate(input_ids=ids[None, :4], max_new_tokens=4, do_sample=False)
    assert tokens.shape == (1, 8)


class UNetBlock(nn.Module):
    """Convolutions around cross-attention over an image's positions, with the names that diffusion UNets use."""

    def __init__(self, channels=16, context=24):
        super().__init__()
        self.conv_in, self.conv_out = nn.Conv2d(4, channels, 3, padding=1), nn.Conv2d(channels, 4, 3, padding=1)
        self.norm = nn.GroupNorm(4, channels)
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context, channels, bias=False)
        self.to_v = nn.Linear(context, channels, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels), nn.Dropout(0.0)])

    def forward(self, image, context):  # (B, 4, H, W), (B, T, context) → (B, 4, H, W)
        hidden = self.conv_in(image)
        rows = self.norm(hidden).flatten(2).transpose(1, 2)  # (B, H·W, channels), not contiguous
        mixed = F.scaled_dot_product_attention(self.to_q(rows), self.to_k(context), self.to_v(context))
        hidden = hidden + self.to_out[0](mixed).transpose(1, 2).view_as(hidden)
        return self.conv_out(hidden)


def test_unet_attention(tmp_path):
    torch.manual_seed(0)
    state = UNetBlock().state_dict()

    def block():
        model = UNetBlock()
        model.load_state_dict(state)
        return model

    model = get_peft_model(block(), MosLoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    image, context = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 24)
    target = torch.randn(2, 4, 8, 8)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(30):
        loss = (model(image, context) - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] == (block()(image, context) - target).square().mean().item()  # B = 0: it starts as the base
    assert losses[-1] < 0.97 * losses[0]
    expected = model.eval()(image, context)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(block(), tmp_path)(image, context), expected)
    assert torch.allclose(model.merge_and_unload()(image, context), expected, atol=1e-5)
