"""``scripts/convert_adapter.py``: every adapter that is read is written in our form or as a plain LoRA, exactly."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear
from safetensors.torch import load_file, save_file

from llava_moslora.adapters.config import MosLoraConfig
from llava_moslora.errors import Refusal
from support.adapter_models import Pair, adapted
from support.mmengine_log import save_with_log

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from convert_adapter import convert  # noqa: E402

X = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def spelled(folder: Path, mixer: str, **changes) -> None:
    """Our training form in ``folder``, as another implementation would have written it."""
    save_file({k.replace("lora_mixer", mixer): v for k, v in load_file(folder / FILE).items()}, folder / FILE)
    stored = json.loads((folder / CONFIG).read_text())
    ours = ("train_mixer", "mixer_init", "mixer_init_pattern", "train_mixer_pattern", "dropout_pattern")
    stored = {key: value for key, value in stored.items() if key not in ours} | {"peft_type": "LORA"} | changes
    (folder / CONFIG).write_text(json.dumps(stored))


def source_of(kind: str, place: Path) -> tuple[Path, PeftModel, dict]:
    """What is converted, the model that it came from, and the flags."""
    model = adapted(Pair(), plain=kind == "plain LoRA", **({} if kind == "plain LoRA" else {"mixer_init": "normal"}))
    model.save_pretrained(place)
    if kind == "the reference repository's":
        spelled(place, "lora_AB", lora_use_mixer=True)
    elif kind == "the PEFT fork's":
        spelled(place, "lora_mixer", use_moslora="orth")
    elif kind == "XTuner's":
        live = {f"llm.{k.replace('.weight', '.default.weight')}": v for k, v in load_file(place / FILE).items()}
        save_with_log(live | {"projector.model.0.weight": torch.ones(2, 2)}, place / "iter_1.pth")
        return place / "iter_1.pth", model, {"rename": ["llm.="], "lora_alpha": ["12"]}
    return place, model, {}


KINDS = ["ours", "the reference repository's", "the PEFT fork's", "plain LoRA", "XTuner's"]


@pytest.mark.parametrize("kind", KINDS)
def test_both_forms_compute_what_the_source_computes(tmp_path, capsys, kind):
    source, model, flags = source_of(kind, tmp_path / "source")
    flags = {"rename": [], "lora_alpha": []} | flags
    expected = model.eval()(X)
    convert(source, tmp_path / "lora", "lora", **flags)
    convert(source, tmp_path / "moslora", "moslora", **flags)
    stock = PeftModel.from_pretrained(Pair(), tmp_path / "lora").eval()
    assert type(stock.peft_config["default"]) is LoraConfig and type(stock.base_model.model.up) is Linear
    assert torch.allclose(stock(X), expected, atol=1e-5)
    ours = PeftModel.from_pretrained(Pair(), tmp_path / "moslora", is_trainable=True).eval()
    assert type(ours.peft_config["default"]) is MosLoraConfig
    assert torch.allclose(ours(X), expected, atol=1e-6)
    assert any(p.requires_grad for name, p in ours.named_parameters() if "lora_mixer" in name)
    printed = capsys.readouterr().out
    assert printed.count("2 layers of rank 8") == 2
    assert ("not written: projector.model.0.weight" in printed) == (kind == "XTuner's")
    assert {path.name for path in (tmp_path / "lora").iterdir()} == {FILE, CONFIG}


def test_converting_our_own_form_changes_nothing(tmp_path):
    source, _, _ = source_of("ours", tmp_path / "source")
    convert(source, tmp_path / "again", "moslora", [], [])
    for name in (FILE, CONFIG):
        assert (tmp_path / "again" / name).read_bytes() == (source / name).read_bytes()


def test_a_plain_lora_is_readable_by_an_older_peft(tmp_path):
    """A field that every PEFT knows, or that says something."""
    source, _, _ = source_of("ours", tmp_path / "source")
    convert(source, tmp_path / "lora", "lora", [], [])
    stored = json.loads((tmp_path / "lora" / CONFIG).read_text())
    assert "exclude_modules" not in stored and "lora_bias" not in stored and stored["peft_type"] == "LORA"
    model = get_peft_model(Pair(), MosLoraConfig(r=4, target_modules="all-linear", exclude_modules=["down"]))
    model.save_pretrained(tmp_path / "excluding")
    convert(tmp_path / "excluding", tmp_path / "excluding-lora", "lora", [], [])
    assert json.loads((tmp_path / "excluding-lora" / CONFIG).read_text())["exclude_modules"] == ["down"]


REFUSED = [
    ("ours", {"rename": ["llm."]}, r"C-FLAG\] --rename: no = in it; found llm\.; expected OLD=NEW"),
    ("ours", {"rename": ["llm.=x."]}, r"C-FLAG\] .*--rename: no name in the adapter begins with it; found llm\."),
    ("ours", {"rename": ["up=down"]}, r"K-ADAPTER\] .*two layers get the same name; found down"),
    ("ours", {"lora_alpha": ["12"]}, r"C-FLAG\] .*--lora_alpha: the folder's adapter_config.json has it; found 12"),
    ("XTuner's", {}, r"K-ADAPTER\] .*iter_1\.pth:llm\.\w+: the file does not contain the lora_alpha"),
    ("XTuner's", {"lora_alpha": ["llm.=many"]}, r"C-FLAG\] --lora_alpha: not a number; found llm\.=many"),
    (
        "XTuner's",
        {"lora_alpha": ["llm.=1", "vit.=1"]},
        r"C-FLAG\] .*--lora_alpha: no name .* begins with it; found vit\.",
    ),
]


@pytest.mark.parametrize(("kind", "flags", "message"), REFUSED)
def test_refused(tmp_path, kind, flags, message):
    source, _, _ = source_of(kind, tmp_path / "source")
    with pytest.raises(Refusal, match=message) as refusal:
        convert(source, tmp_path / "out", "lora", **({"rename": [], "lora_alpha": []} | flags))
    assert refusal.value.expected or refusal.value.fix or "same name" in message
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_existing_folder_and_a_missing_source_are_refused(tmp_path):
    source, _, _ = source_of("ours", tmp_path / "source")
    with pytest.raises(Refusal, match=r"C-OUTPUT\] .*source:--output_dir: already exists"):
        convert(source, source, "lora", [], [])
    with pytest.raises(Refusal, match=r"K-ADAPTER\] .*nowhere: no adapter weights here"):
        convert(tmp_path / "nowhere", tmp_path / "out", "lora", [], [])


def test_on_the_command_line(tmp_path):
    source, _, _ = source_of("XTuner's", tmp_path / "source")
    command = [sys.executable, ROOT / "scripts" / "convert_adapter.py", source, "--output_dir", tmp_path / "out"]
    flags = ["--format", "lora", "--rename", "llm.up=x.up", "llm.down=x.down", "--lora_alpha", "llm.=12"]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {name.rpartition(".lora_")[0] for name in load_file(tmp_path / "out" / FILE)} == {
        "base_model.model.x.up",
        "base_model.model.x.down",
    }
    again = subprocess.run([*command, *flags], capture_output=True, text=True, check=False)
    assert again.returncode == 2 and "error[C-OUTPUT]" in again.stderr and "Traceback" not in again.stderr
