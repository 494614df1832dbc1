"""The plan, a sum of parts of which each is measured once, against a whole step of all layers at 8B shapes.

The step runs the real training forward and its backward over every layer on the meta device, and every living storage
is counted together with the gradients: nothing is multiplied by a number of layers and no two moments are compared.
What both share, and so cannot show, is in docs/planning.md.
"""

import pytest
import torch
from peft import PeftModel
from transformers import CLIPVisionConfig, LlamaConfig

from llava_moslora.config import AdapterSettings
from llava_moslora.devices import DEVICES
from llava_moslora.models import llava
from llava_moslora.models.assemble import model_on_meta
from llava_moslora.planning.activations import _inside
from llava_moslora.planning.memory import _workspaces, memory
from llava_moslora.planning.meter import Meter
from llava_moslora.planning.on_meta import compute_as_on_gpu
from llava_moslora.planning.setting import Batch, Choice, Model, Zero
from llava_moslora.planning.states import count, states
from llava_moslora.recompute import set_recompute
from support.planned import CLIP_L_336, LLAMA_3_8B

CLOSE = 0.05
SETTINGS = {
    "full": ("full", 16, Batch(8, 2048, 8, 1600), {}),
    "selective": ("selective", 16, Batch(8, 2048, 8, 1600), {}),
    "none": ("none", 16, Batch(4, 2048, 4, 800), {}),
    "every:2": ("every:2", 16, Batch(4, 2048, 4, 800), {}),
    "NF4": ("full", 4, Batch(8, 2048, 8, 1600), {}),
    "NF4, none": ("none", 4, Batch(2, 1024, 2, 200), {}),
    "text alone": ("none", 16, Batch(4, 256, 0, 400), {"vision": False}),
    "packing": ("selective", 16, Batch(3, 2048, 8, 1600, packed=True), {}),
    "long answers": ("full", 16, Batch(8, 2048, 8, 8192), {}),
    "rank 16, tower frozen": (
        "none",
        16,
        Batch(2, 2048, 2, 400),
        {"adapter": AdapterSettings(lora_r=16, vision_lora_r=0)},
    ),
    "stage 1": ("full", 16, Batch(8, 1024, 8, 400), {"adapter": AdapterSettings(tune_mm_mlp_adapter=True)}),
}


def whole_step(model: Model, recompute: str, batch: Batch) -> int:
    """The most bytes alive in forward and backward, inputs and gradients included, weights not."""
    whole = model_on_meta(model.llm_config, model.vision_config, model.adapter, model.dtype).train()
    compute_as_on_gpu(whole.get_base_model() if isinstance(whole, PeftModel) else whole, model.attention)
    set_recompute(whole, recompute)
    shape = (batch.rows, batch.tokens)
    with Meter(_inside(model.bits)) as meter, torch.device("meta"):
        meter.ignore([*whole.parameters(), *whole.buffers()])
        for p in whole.parameters():
            p.grad = torch.empty_like(p) if p.requires_grad else None  # of the micro-batch before
        inputs = {name: torch.zeros(shape, dtype=torch.long) for name in ("input_ids", "labels")}
        inputs["label_positions"] = torch.zeros(batch.labels, dtype=torch.long)
        if model.vision_config is not None:
            size = model.vision_config.image_size
            inputs["pixel_values"] = torch.zeros(batch.images, 3, size, size, dtype=model.dtype)
            inputs["image_positions"] = torch.zeros(batch.images * model.image_tokens, dtype=torch.long)
        if batch.packed:
            records = torch.zeros(9, dtype=torch.int32)
            inputs |= {"position_ids": torch.zeros(shape, dtype=torch.long), "cu_seq_lens_q": records}
            inputs |= {"cu_seq_lens_k": records, "max_length_q": batch.tokens, "max_length_k": batch.tokens}
        whole(**inputs).loss.backward()
    return meter.peak


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_the_plan_is_a_whole_steps_peak(name, monkeypatch, record_property):
    recompute, bits, batch, more = SETTINGS[name]
    monkeypatch.setattr(llava, "can_omit_mask", lambda *_, **__: True)  # as on a GPU
    vision = CLIPVisionConfig(**CLIP_L_336) if more.get("vision", True) else None
    adapter = more.get("adapter", AdapterSettings() if vision else AdapterSettings(vision_lora_r=0))
    model = Model(LlamaConfig(**LLAMA_3_8B), vision, adapter, bits=bits)
    device, zero = DEVICES["H100"], Zero()  # no DeepSpeed: gradients are those that autograd makes
    at_rest = states(count(model), zero, gpus=1)
    step = whole_step(model, recompute, batch) + at_rest.total - at_rest.gradients
    found = memory(model, Choice(batch.rows, 1, recompute, bits, zero), batch, device, gpus=1)
    planned = found.peak - _workspaces(device)  # which are outside of torch's operations
    print(f"{name:<24} planned {planned / 2**30:7.3f} GiB, whole step {step / 2**30:7.3f}: {planned / step - 1:+.2%}")
    assert step <= planned <= (1 + CLOSE) * step
