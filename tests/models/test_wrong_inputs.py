"""Wrong inputs, one by one: each is answered by one refusal that names the file and says what to do.

Every case breaks a copy of good parts and hands them to ``assemble``. Pickles that would run code write a sentinel.
"""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from llava_moslora.errors import Refusal
from llava_moslora.models.assemble import assemble
from llava_moslora.text.tokenizer import load_tokenizer
from support.internlm2_reference import write_internlm2
from support.settings import parts_of
from support.tiny import tiny_tokenizer, write_projector


class Payload:
    """A pickle of this runs code when it is loaded the ordinary way."""

    sentinel: Path

    def __reduce__(self):
        return open, (str(self.sentinel), "w")


def edit(folder: Path, **changes) -> None:
    file = folder / "config.json"
    raw = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))


def rewrite(file: Path, change) -> None:
    """Change a safetensors file's tensors in place."""
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file)


def cut(file: Path, by: int = 7) -> None:
    file.write_bytes(file.read_bytes()[:-by])


def poison(file: Path, tensors: Path | None = None) -> None:
    content = load_file(tensors) if tensors else {}
    torch.save(content | {"projector.model.0.weight": Payload()}, file)
    if tensors:
        tensors.unlink()


def shards(folder: Path) -> list[Path]:
    """The LLM's weights in two shards."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = [folder / f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    weight_map = {}
    for n, file in enumerate(files):
        part = {name: tensors[name] for name in list(tensors)[n::2]}
        save_file(part, file)
        weight_map |= dict.fromkeys(part, file.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return files


def internlm2(good, **changes) -> None:
    shutil.rmtree(good.llm)
    write_internlm2(good.llm, vocab_size=320)
    edit(good.llm, bos_token_id=None, **changes)
    tiny_tokenizer().save_pretrained(good.llm)


def gpt2(good) -> None:
    shutil.rmtree(good.llm)
    GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=320, n_positions=8)).save_pretrained(good.llm)


def enlarge(good) -> None:
    good.tokenizer.add_tokens([f"<new {n}>" for n in range(9)])


def deepspeed_zero3(good) -> None:
    good.projector = good.llm.parent / "iter_9.pth"
    good.projector.mkdir()
    (good.projector / "zero_pp_rank_0_mp_rank_00_model_states.pt").write_bytes(b"")


def xtuner_relu(good) -> None:
    config = {"model_type": "projector", "depth": 2, "hidden_act": "relu", "bias": True}
    (good.projector.parent / "config.json").write_text(json.dumps(config))


def three_layers(t) -> None:
    t["model.4.weight"] = torch.zeros(64, 64)


def nan(t) -> None:
    t["model.2.bias"][0] = float("nan")


def put(good, **values) -> None:
    good.__dict__.update(values)


LLM_FILE, CLIP_FILE = "model.safetensors", "model.safetensors"
# what is wrong: (how to make it so, the code, the end of the named file's path)
WRONG = {
    "LLM: path that does not exist": (lambda g: put(g, llm=g.llm / "nowhere"), "C-PATH", "nowhere"),
    "LLM: a file instead of a folder": (lambda g: put(g, llm=g.llm / LLM_FILE), "C-PATH", LLM_FILE),
    "LLM: empty folder": (lambda g: [f.unlink() for f in g.llm.iterdir()], "C-PATH", "llm"),
    "LLM: config.json cut": (lambda g: cut(g.llm / "config.json"), "K-JSON", "llm/config.json"),
    "LLM: config.json is a list": (lambda g: (g.llm / "config.json").write_text("[]"), "K-JSON", "llm/config.json"),
    "LLM: unknown architecture with code": (
        lambda g: edit(g.llm, model_type="own", auto_map={"AutoConfig": "code.Own"}), "C-MODEL", "llm/config.json"),
    "LLM: known architecture with code": (
        lambda g: edit(g.llm, architectures=["OwnForCausalLM"], auto_map={"AutoModelForCausalLM": "code.Own"}),
        "C-MODEL", "llm/config.json"),
    "LLM: a field of the wrong type": (lambda g: edit(g.llm, hidden_size="wide"), "C-MODEL", "llm/config.json"),
    "LLM: an unknown activation": (lambda g: edit(g.llm, hidden_act="geglu"), "C-MODEL", "llm"),
    "LLM: heads that do not divide its width": (
        lambda g: edit(g.llm, num_attention_heads=5, head_dim=None), "C-MODEL", "llm/config.json"),
    "LLM: 4-bit folder as base": (
        lambda g: edit(g.llm, quantization_config={"load_in_4bit": True}), "C-MODEL", "llm/config.json"),
    "LLM: a vision tower": (lambda g: put(g, llm=g.clip), "C-MODEL", "clip/config.json"),
    "LLM: an architecture that does not compose": (gpt2, "C-MODEL", "llm/config.json"),
    "LLM: no weights": (lambda g: (g.llm / LLM_FILE).unlink(), "K-MISSING", "llm"),
    "LLM: truncated": (lambda g: cut(g.llm / LLM_FILE), "K-DAMAGED", LLM_FILE),
    "LLM: a tensor is missing": (
        lambda g: rewrite(g.llm / LLM_FILE, lambda t: t.pop("model.norm.weight")), "K-KEYS", "llm"),
    "LLM: a tensor too many": (
        lambda g: rewrite(g.llm / LLM_FILE, lambda t: t.update(extra=torch.zeros(2))), "K-KEYS", LLM_FILE),
    "LLM: config.json of another size": (lambda g: edit(g.llm, vocab_size=330), "K-SHAPE", LLM_FILE),
    "LLM: a shard is missing": (lambda g: shards(g.llm)[1].unlink(), "K-MISSING", "00002-of-00002.safetensors"),
    "LLM: a shard is cut": (lambda g: cut(shards(g.llm)[0]), "K-DAMAGED", "00001-of-00002.safetensors"),
    "LLM: a shard too many": (
        lambda g: shutil.copy(shards(g.llm)[0], g.llm / "model-00003-of-00003.safetensors"),
        "K-KEYS", "00003-of-00003.safetensors"),
    "LLM: pickle with code": (
        lambda g: poison(g.llm / "pytorch_model.bin", g.llm / LLM_FILE), "K-DAMAGED", "pytorch_model.bin"),
    "LLM: InternLM2 with other heads": (lambda g: internlm2(g, num_key_value_heads=4), "K-SHAPE", LLM_FILE),
    "LLM: InternLM2 with unknown scaling": (
        lambda g: internlm2(g, rope_scaling={"type": "yarn"}), "K-CONFIG", "llm/config.json"),
    "LLM: a LLaVA with another feature layer": (
        lambda g: edit(g.llm, architectures=["LlavaForConditionalGeneration"], vision_feature_layer=-1),
        "C-MODEL", "llm/config.json"),
    "tokenizer: of a larger vocabulary": (enlarge, "K-TOKENIZER", "llm"),
    "tokenizer: begins with another token": (
        lambda g: (edit(g.llm, bos_token_id=9), put(g, bos="is")), "K-TOKENIZER", "llm"),
    "tokenizer: no placeholder": (
        lambda g: put(g, tokenizer=AutoTokenizer.from_pretrained(g.llm)), "K-TOKENIZER", "llm"),
    "tower: path that does not exist": (lambda g: put(g, clip=g.clip / "nowhere"), "K-MISSING", "clip/nowhere"),
    "tower: code of its own": (lambda g: edit(g.clip, auto_map={"AutoModel": "c.M"}), "K-CODE", "clip/config.json"),
    "tower: NaFlex": (lambda g: edit(g.clip, model_type="siglip2_vision_model"), "K-TOWER", "clip/config.json"),
    "tower: a CLIP called SigLIP": (lambda g: edit(g.clip, model_type="siglip_vision_model"), "K-KEYS", "clip"),
    "tower: heads that do not divide its width": (
        lambda g: edit(g.clip, num_attention_heads=5), "K-CONFIG", "clip/config.json"),
    "tower: oblong images": (lambda g: edit(g.clip, image_size=[32, 64]), "K-CONFIG", "clip/config.json"),
    "tower: quantised": (lambda g: edit(g.clip, quantization_config={"bits": 8}), "K-QUANT", "clip/config.json"),
    "tower: no preprocessing": (
        lambda g: (g.clip / "preprocessor_config.json").unlink(), "K-MISSING", "preprocessor_config.json"),
    "tower: images of another size": (
        lambda g: edit(g.clip, image_size=40), "K-PROCESSOR", "preprocessor_config.json"),
    "tower: fewer layers than config.json": (lambda g: edit(g.clip, num_hidden_layers=4), "K-KEYS", "clip"),
    "tower: truncated": (lambda g: cut(g.clip / CLIP_FILE), "K-DAMAGED", CLIP_FILE),
    "tower: pickle with code": (
        lambda g: poison(g.clip / "pytorch_model.bin", g.clip / CLIP_FILE), "K-DAMAGED", "pytorch_model.bin"),
    "projector: path that does not exist": (lambda g: put(g, projector=g.llm / "x.pth"), "C-PATH", "x.pth"),
    "projector: folder without one": (lambda g: put(g, projector=g.clip.parent), "C-PATH", None),
    "projector: of another tower": (lambda g: write_projector(g.projector, vision=48), "K-SHAPE", "p.safetensors"),
    "projector: of another LLM": (lambda g: write_projector(g.projector, llm=80), "K-SHAPE", "p.safetensors"),
    "projector: no key matches": (
        lambda g: save_file({"lm.weight": torch.zeros(2)}, g.projector), "K-PROJECTOR", "p.safetensors"),
    "projector: three layers": (lambda g: rewrite(g.projector, three_layers), "K-PROJECTOR", "p.safetensors"),
    "projector: NaN": (lambda g: rewrite(g.projector, nan), "K-FINITE", "p.safetensors"),
    "projector: another activation": (xtuner_relu, "K-PROJECTOR", "config.json"),
    "projector: truncated": (lambda g: cut(g.projector), "K-DAMAGED", "p.safetensors"),
    "projector: DeepSpeed ZeRO-3 folder": (deepspeed_zero3, "K-PROJECTOR", "iter_9.pth"),
    "projector: pickle with code": (
        lambda g: (put(g, projector=g.projector.with_suffix(".pth")), poison(g.projector)), "K-DAMAGED", "p.pth"),
    "projector: a text file": (lambda g: g.projector.write_text("see README"), "K-DAMAGED", "p.safetensors"),
}  # fmt: skip


@pytest.fixture
def good(parts, tmp_path) -> SimpleNamespace:
    """Copies of good parts, to be broken."""
    Payload.sentinel = tmp_path / "SENTINEL"
    (tmp_path / "projector").mkdir()
    return SimpleNamespace(
        llm=shutil.copytree(parts.llm, tmp_path / "llm"),
        clip=shutil.copytree(parts.clip, tmp_path / "clip"),
        projector=shutil.copy(parts.projector, tmp_path / "projector" / "p.safetensors"),
        tokenizer=load_tokenizer(parts.llm),
        bos=None,
    )


def build(good):
    good.tokenizer.bos_token = good.bos
    return assemble(parts_of(good.llm, good.clip, good.projector), tokenizer=good.tokenizer, dtype=torch.float32)


def test_the_parts_are_good(good):
    build(good)
    poison(good.projector.with_suffix(".pth"))
    torch.load(good.projector.with_suffix(".pth"), weights_only=False)
    assert Payload.sentinel.exists()  # the poison works


# C17: code in a model's folder
# K5: a pickle with code
# K9: a tokenizer of another vocabulary
# K14: a file in place of a folder
@pytest.mark.parametrize("case", WRONG)
def test_wrong_input(good, tmp_path, case):
    breaking, code, file = WRONG[case]
    breaking(good)
    with pytest.raises(Refusal) as caught:
        build(good)
    refusal = caught.value
    assert refusal.code == code, refusal.line()
    assert str(refusal.file).endswith(file or tmp_path.name), refusal.line()
    assert refusal.fix and "\n" not in refusal.line(), refusal.line()
    assert not Payload.sentinel.exists()


def test_there_are_thirty_of_them():
    assert len(WRONG) >= 30
