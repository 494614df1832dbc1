"""Every recipe as it would start: its command line through the real parser, its model on the meta device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import CLIPVisionConfig, LlamaConfig

from llava_moslora.adapters.methods import check_method
from llava_moslora.diffusion.command_line import parse as parse_sdxl
from llava_moslora.errors import Refusal
from llava_moslora.models.assemble import model_on_meta
from llava_moslora.models.llava_folder import name_parts
from llava_moslora.models.llm import read_llm_config
from llava_moslora.models.names import LLM, LM_HEAD, PROJECTOR, VISION_TOWER
from llava_moslora.models.vision import read_vision_config
from llava_moslora.training.arguments import TrainingArguments
from llava_moslora.training.command_line import accumulation_steps, parse
from llava_moslora.training.text_only import check_text_only
from support.internlm2_reference import CONFIG as INTERNLM2
from support.launching import ROOT

# Started instead of the launcher: says how it was called.
LAUNCHER = f"""#!{sys.executable}
import json, os, sys
json.dump([os.path.basename(sys.argv[0]), *sys.argv[1:]], open(os.environ["SEEN"], "w"))
"""
LAYERS = 4  # of the real 32: a recipe does not say how many, and the widths are real
SIZES = {"hidden_size": 4096, "num_hidden_layers": LAYERS, "num_attention_heads": 32}
EIGHT_B = SIZES | {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256}
SEVEN_B = SIZES | {"intermediate_size": 11008, "num_key_value_heads": 32, "vocab_size": 32000}
CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
CLIP_L |= {"image_size": 336, "patch_size": 14}
KAIMING, ORTHOGONAL, NONE = ("kaiming_uniform", True), ("orthogonal", True), ("identity", False)
# Table 8: learning rate, rank and alpha of the LLM and of the vision tower, then the mixer; batch per GPU, accumulation
LLAMA3 = (2e-5, (64, 128), (64, 16))
INTERNLM = (2e-5, (512, 256), (64, 16))
TABLE_8 = {
    "llama3_8b_lora": (*LLAMA3, NONE, 16, (8, 2)),
    "llama3_8b_moslora": (*LLAMA3, KAIMING, 16, (8, 2)),
    "llama3_8b_moslora_orthogonal": (*LLAMA3, ORTHOGONAL, 16, (8, 2)),
    "internlm2_7b_qlora": (*INTERNLM, NONE, 4, (16, 1)),
    "internlm2_7b_qmoslora": (*INTERNLM, KAIMING, 4, (16, 1)),
    "internlm2_7b_qmoslora_orthogonal": (*INTERNLM, ORTHOGONAL, 4, (16, 1)),
    "llama3_8b_qmoslora_24gb": (*LLAMA3, KAIMING, 4, (4, 16)),  # the same global batch on one GPU
    "llama3_8b_moslora_two_hosts": (*LLAMA3, KAIMING, 16, (8, 1)),  # and on eight
}
# Table 4: parameters in millions, as printed; Table 7's mixer
TABLE_4 = {"llama3_8b_commonsense_lora": (28.3, NONE), "llama3_8b_commonsense_moslora": (28.4, KAIMING)}
# Every row of Table 4 through --method: rank, "Param" as printed, learning rate (DoRA*, at rank 32, has its own)
ANY_ROW = "llama3_8b_commonsense"
TABLE_4_ROWS = {
    ("lora", ""): (16, "28.3M", 3e-5),  # as the recipe of its own, above
    ("lokr", ""): (8, "0.9M", 3e-5),
    ("loha", ""): (8, "28.3M", 3e-5),
    ("flora", ""): (16, "28.4M", 3e-5),
    ("adalora", ""): (16, "28.3M", 3e-5),
    ("dora", ""): (16, "29.1M", 3e-5),
    ("dora", "32"): (32, "57.4M", 1e-5),
    ("moslora", ""): (16, "28.4M", 3e-5),
}
RUN = "playground/runs/llama3-8b-moslora"
STAGE_1 = ["llama3_8b_pretrain", "internlm2_7b_pretrain"]
RECIPES = [*TABLE_8, *TABLE_4, ANY_ROW, *STAGE_1, "vicuna_7b_moslora"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Configurations of the real parts, no weights; and launchers that only say how they were called."""
    folder = tmp_path_factory.mktemp("recipes")
    LlamaConfig(**EIGHT_B, bos_token_id=128000).save_pretrained(folder / "llama3")
    LlamaConfig(**SEVEN_B).save_pretrained(folder / "vicuna")
    CLIPVisionConfig(**CLIP_L).save_pretrained(folder / "clip")
    (folder / "internlm2").mkdir()
    sizes = EIGHT_B | {"vocab_size": 92544, "max_position_embeddings": 32768}
    (folder / "internlm2" / "config.json").write_text(json.dumps(INTERNLM2 | sizes))
    (folder / "bin").mkdir()
    for name in ("deepspeed", "torchrun", "srun"):
        (folder / "bin" / name).write_text(LAUNCHER)
        (folder / "bin" / name).chmod(0o755)
    return folder


def start(folders: Path, recipe: str, *more: str, **variables: str) -> list[str]:
    """The command that a recipe starts."""
    seen = folders / "seen.json"
    environment = os.environ | {
        "PATH": f"{folders / 'bin'}:{os.environ['PATH']}",
        "SEEN": str(seen),
        "LLM": str(folders / recipe.split("_")[0]),
        "TOWER": str(folders / "clip"),
    }
    if recipe.endswith("two_hosts"):
        environment |= {"MASTER": "10.0.0.1", "HOSTFILE": "hosts"}
    command = ["bash", str(ROOT / "scripts" / f"{recipe}.sh"), *more]
    done = subprocess.run(command, capture_output=True, text=True, env=environment | variables, cwd=folders)
    assert done.returncode == 0, done.stderr
    return json.loads(seen.read_text())


def arguments(folders: Path, recipe: str, *more: str, **variables: str):
    command = start(folders, recipe, *more, **variables)
    *settings, training = parse(command[command.index("scripts/train_vit_llm.py") + 1 :])
    return *settings, TrainingArguments(**training)


def batches(folders: Path, recipe: str, *more: str, **variables: str) -> tuple[int, int]:
    """Records per GPU and micro-batch, and micro-batches per step, on as many GPUs as the recipe starts."""
    command = start(folders, recipe, *more, **variables)
    gpus = 8 if recipe.endswith("two_hosts") else int(command[command.index("--num_gpus") + 1])
    *_, training = parse(command[command.index("scripts/train_vit_llm.py") + 1 :])
    assert training["gradient_accumulation_steps"] is None
    per_device = training["per_device_train_batch_size"]
    return per_device, accumulation_steps(training["global_batch_size"], per_device, gpus)


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)  # recipes name zero_configs/ from there


def trained(model, part: str, kind: str = "") -> int:
    return sum(p.numel() for n, p in model.named_parameters() if f"{part}." in n and kind in n and p.requires_grad)


def sketch(model_args, adapter_args):
    """The recipe's model: every tensor in its place and size, none in memory."""
    config = read_llm_config(model_args.model_name_or_path)
    return model_on_meta(config, read_vision_config(model_args.vision_tower), adapter_args)


@pytest.mark.parametrize("recipe", TABLE_8)
def test_recipe_is_the_papers_table_8(folders, recipe):
    rate, llm, vision, mixer, bits, batch = TABLE_8[recipe]
    model_args, data_args, adapter_args, args = arguments(folders, recipe)
    assert (args.learning_rate, model_args.bits) == (rate, bits)
    assert batches(folders, recipe) == batch
    for tower, (rank, alpha) in zip((adapter_args.llm, adapter_args.vision), (llm, vision), strict=True):
        assert (tower.r, tower.lora_alpha, tower.lora_dropout) == (rank, alpha, 0.05)
        assert (tower.mixer_init, tower.train_mixer) == mixer
    assert (args.num_train_epochs, args.warmup_steps, args.lr_scheduler_type) == (1, 0.03, "cosine")
    assert (args.weight_decay, args.max_grad_norm, args.adam_beta1, args.adam_beta2) == (0, 1, 0.9, 0.999)
    assert args.bf16 and args.recompute == ("full" if "24gb" in recipe else "auto") and args.resume
    assert (data_args.model_max_length, data_args.image_aspect_ratio) == (2048, "pad")

    model = sketch(model_args, adapter_args)
    assert trained(model, PROJECTOR) == 20_979_712
    assert trained(model, LLM, "lora_A") == LAYERS * llm[0] * (4096 * 6 + 14336)
    mixers = LAYERS * 7 * llm[0] ** 2 if mixer[1] else 0
    assert trained(model, LLM, "lora_mixer") == mixers
    assert trained(model, VISION_TOWER, "lora_mixer") == (23 * 6 * 64**2 if mixer[1] else 0)
    assert trained(model, LM_HEAD) == 0


@pytest.mark.parametrize("recipe", ["internlm2_7b_qlora", "internlm2_7b_qmoslora", "internlm2_7b_qmoslora_orthogonal"])
def test_the_authors_own_values(folders, recipe):
    """Learning rate 2e-4, the LM head adapted, no mixer in the vision tower: their published config file."""
    model_args, _, adapter_args, args = arguments(folders, recipe, HYPER="authors")
    llm, vision = adapter_args.llm, adapter_args.vision
    assert args.learning_rate == 2e-4
    assert (llm.mixer_init, llm.train_mixer) == TABLE_8[recipe][3] and not vision.train_mixer
    model = sketch(model_args, adapter_args)
    assert trained(model, LM_HEAD, "lora_A") + trained(model, LM_HEAD, "lora_B") == 512 * (4096 + 92544)
    assert trained(model, VISION_TOWER, "lora_mixer") == 0 and trained(model, VISION_TOWER, "lora_A") > 0
    assert batches(folders, recipe, "--global_batch_size", "32", HYPER="authors", GPUS="2") == (16, 1)  # their script's


@pytest.mark.parametrize(("recipe", "mixers"), [("internlm2_7b_qlora", 0), ("internlm2_7b_qmoslora", 512**2)])
def test_internlm2s_header_has_its_numbers_of_parameters(folders, recipe, mixers):
    """Here, and with the fused linear of q, k and v that the authors adapt."""
    model_args, _, adapter_args, _ = arguments(folders, recipe)
    here = trained(sketch(model_args, adapter_args), LLM) * 32 // LAYERS
    linears = (4096 + 6144, 4096 + 4096, 4096 + 14336, 4096 + 14336, 14336 + 4096)
    fused = 32 * sum(512 * width + mixers for width in linears)
    header = (ROOT / "scripts" / f"{recipe}.sh").read_text().partition("set -e")[0]
    assert f"{here / 1e6:,.0f}M" in header and f"there {fused / 1e6:,.0f}M" in header


@pytest.mark.parametrize("recipe", STAGE_1)
def test_stage_1_trains_the_projector_alone(folders, recipe):
    model_args, data_args, adapter_args, args = arguments(folders, recipe)
    assert adapter_args.tune_mm_mlp_adapter and model_args.pretrain_mm_mlp_adapter is None
    assert args.learning_rate == 1e-3
    assert args.global_batch_size == 256 and batches(folders, recipe) == (32, 2)
    assert (data_args.image_aspect_ratio, data_args.data_order) == ("crop", "shuffle")
    model = sketch(model_args, adapter_args)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained(model, PROJECTOR) == 20_979_712


def test_vicuna_is_llava_1_5s_lora_run(folders):
    model_args, _, adapter_args, args = arguments(folders, "vicuna_7b_moslora")
    llm, vision = adapter_args.llm, adapter_args.vision
    assert (llm.r, llm.lora_alpha, vision, model_args.version) == (128, 256, None, "vicuna_v1")
    assert (args.learning_rate, args.mm_projector_lr) == (2e-4, 2e-5)
    assert args.global_batch_size == 128 and batches(folders, "vicuna_7b_moslora") == (16, 1)
    model = sketch(model_args, adapter_args)
    assert trained(model, VISION_TOWER) == 0 and trained(model, LLM, "lora_A") == LAYERS * 128 * (4096 * 6 + 11008)


@pytest.mark.parametrize("recipe", TABLE_4)
def test_commonsense_is_the_papers_table_7_and_4(folders, recipe):
    millions, mixer = TABLE_4[recipe]
    model_args, data_args, adapter_args, args = arguments(folders, recipe)
    assert model_args.vision_tower is None and model_args.version == "llm_adapters"
    adapter_args = check_text_only(name_parts(model_args), data_args, adapter_args, vars(args))
    llm = adapter_args.llm
    assert (llm.r, llm.lora_alpha, llm.lora_dropout, adapter_args.vision) == (16, 32, 0.05, None)
    assert (llm.mixer_init, llm.train_mixer) == mixer
    assert (args.num_train_epochs, args.learning_rate, args.warmup_steps) == (3, 3e-5, 100)
    assert (args.lr_scheduler_type, args.weight_decay, batches(folders, recipe)) == ("linear", 0, (4, 4))
    assert data_args.train_on_prompt and (data_args.model_max_length, data_args.data_order) == (256, "shuffle")
    *_, args = arguments(folders, recipe, LR="3e-4", SEED="2")
    assert (args.learning_rate, args.seed) == (3e-4, 2)

    config = LlamaConfig(**EIGHT_B | {"num_hidden_layers": 32})  # complete, on the meta device
    model = model_on_meta(config, None, adapter_args)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert round(count / 1e6, 1) == millions
    linears = 4096 + 4096, 4096 + 1024, 4096 + 1024, 4096 + 14336, 14336 + 4096
    mixers = 32 * 5 * 16**2 if mixer[1] else 0
    assert count == trained(model, "model.layers") == 32 * 16 * sum(linears) + mixers


@pytest.mark.parametrize(("method", "rank"), TABLE_4_ROWS)
def test_every_row_of_table_4_has_its_parameters(folders, method, rank):
    """Of the complete model, on the meta device. LoHa's and LoKr's are those of rank 8, not of Table 7's 16."""
    expected_rank, millions, rate = TABLE_4_ROWS[method, rank]
    variables = {"METHOD": method} | ({"RANK": rank} if rank else {})
    assert one_row(folders, **variables) == (expected_rank, millions, rate)


@pytest.mark.parametrize(("method", "millions"), [("loha", "56.6M"), ("lokr", "1.1M")])
def test_table_7s_rank_gives_other_counts(folders, method, millions):
    assert one_row(folders, METHOD=method, RANK="16") == (16, millions, 3e-5)


def one_row(folders, **variables) -> tuple[int, str, float]:
    """Rank, trained parameters of LLaMA-3-8B, learning rate."""
    model_args, data_args, adapter_args, args = arguments(folders, ANY_ROW, **variables)
    adapter_args = check_text_only(name_parts(model_args), data_args, adapter_args, vars(args))
    check_method(adapter_args, model_args.bits, args)
    llm = adapter_args.llm
    assert llm.lora_alpha == 2 * llm.r
    assert (args.num_train_epochs, args.warmup_steps, batches(folders, ANY_ROW, **variables)) == (3, 100, (4, 4))
    model = model_on_meta(LlamaConfig(**EIGHT_B | {"num_hidden_layers": 32}), None, adapter_args)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return llm.r, f"{count / 1e6:.1f}M", args.learning_rate


def test_more_flags_and_other_folders_win(folders):
    *_, args = arguments(folders, "llama3_8b_moslora", "--learning_rate", "1e-4", RUN="elsewhere", GPUS="8")
    assert (args.learning_rate, args.output_dir) == (1e-4, "elsewhere")
    assert batches(folders, "llama3_8b_moslora", GPUS="8") == (8, 1)


@pytest.mark.parametrize("gpus", range(1, 9))
@pytest.mark.parametrize("recipe", ["llama3_8b_moslora", "internlm2_7b_qmoslora", "llama3_8b_pretrain"])
def test_the_global_batch_is_the_same_on_any_number_of_gpus_or_refused(folders, recipe, gpus):
    n = 256 if recipe.endswith("pretrain") else 64
    per_device = {"llama3_8b_moslora": 8, "internlm2_7b_qmoslora": 16, "llama3_8b_pretrain": 32}[recipe]
    if n % (per_device * gpus):
        with pytest.raises(Refusal, match="--global_batch_size: not a multiple"):
            batches(folders, recipe, GPUS=str(gpus))
    else:
        assert batches(folders, recipe, GPUS=str(gpus)) == (per_device, n // (per_device * gpus))


@pytest.mark.parametrize(
    ("variables", "begins"),
    [
        ({}, "deepspeed --hostfile hosts --master_addr 10.0.0.1 --master_port 29500 scripts/"),
        ({"RANK_OF_HOST": "1"}, "--master_port 29500 --no_ssh --node_rank 1 scripts/"),
        ({"LAUNCHER": "torchrun", "RANK_OF_HOST": "1"}, "torchrun --nnodes 2 --nproc_per_node 4 --node_rank 1"),
        ({"LAUNCHER": "slurm"}, "srun bash -c exec torchrun --nnodes $SLURM_NNODES --node_rank $SLURM_NODEID"),
    ],
)
def test_two_hosts_by_each_launcher(folders, variables, begins):
    assert begins in " ".join(start(folders, "llama3_8b_moslora_two_hosts", **variables))


def test_what_slurm_starts_on_a_host(folders):
    """The line that srun is given, run as srun would run it."""
    _, *line = start(folders, "llama3_8b_moslora_two_hosts", LAUNCHER="slurm")
    there = {"PATH": f"{folders / 'bin'}:{os.environ['PATH']}", "SEEN": str(folders / "there.json")}
    subprocess.run(line, check=True, env=os.environ | there | {"SLURM_NNODES": "2", "SLURM_NODEID": "1"})
    command = json.loads((folders / "there.json").read_text())
    torchrun = "torchrun --nnodes 2 --node_rank 1 --nproc_per_node 4 --master_addr 10.0.0.1 --master_port 29500"
    assert " ".join(command).startswith(torchrun + " scripts/train_vit_llm.py") and command[-2:] == [
        "--output_dir",
        RUN,
    ]
    assert "--resume True" in " ".join(command)


def test_every_recipe_is_tested():
    written = {path.stem for path in (ROOT / "scripts").glob("*.sh")} - {"demo", "recipe_defaults"}
    assert written == {*RECIPES, "sdxl_cat"}


@pytest.mark.parametrize("more", [[], ["--mixer_init", "identity", "--train_mixer", "False"]])
def test_the_subject_is_trained_as_the_authors_script_did(folders, more):
    """Section 4.3: orthogonal mixers, batches of four, 500 steps; rank and alpha 4 are their script's."""
    command = start(folders, "sdxl_cat", *more, PROMPT="a photo of ikat cat")
    assert command[:3] == ["deepspeed", "--num_gpus", "1"]
    words = command[command.index("scripts/train_sdxl.py") + 1 :]
    model, data, adapter, training = parse_sdxl(words)
    assert (adapter.lora_r, adapter.lora_alpha, adapter.lora_dropout) == (4, 4, 0)
    mixer = ("identity", False) if more else ("orthogonal", True)
    assert (adapter.init_lora_weights, adapter.mixer_init, adapter.train_mixer) == ("gaussian", *mixer)
    assert (data.prompt, data.resolution, data.resampling, data.center_crop) == (
        "a photo of ikat cat", 1024, "bilinear", False,
    )  # fmt: skip
    assert model.vae and not adapter.train_text_encoder and adapter.snr_gamma is data.class_prompt is None
    expected = {
        "learning_rate": 1e-4, "lr_scheduler_type": "constant", "warmup_steps": 0, "weight_decay": 1e-4,
        "max_grad_norm": 1, "max_steps": 500, "per_device_train_batch_size": 1, "global_batch_size": 4, "bf16": True,
        "seed": 0, "resume": True,
    }  # fmt: skip
    assert {name: training[name] for name in expected} == expected


STUB = """#!/usr/bin/env bash
echo "$(basename $0) $*" >> "$SEEN"
if [ "$(basename $0)" = python ] && [ "$1" = -c ]; then echo 0; fi
[ "$(grep -c . "$SEEN")" -lt "${DIES_AT:-1000}" ] || dies=yes
benchmark=$(grep -o -e --benchmark <<< "$*")
while [ $# -gt 0 ]; do [ "$1" = --output ] && output=$2; shift; done
if [ "$benchmark" ]; then mkdir -p "$output"; [ "$dies" ] || echo whole > "$output/results.json"
elif [ "$output" ]; then echo half > "$output"; fi
[ -z "$dies" ]
"""


@pytest.fixture
def demo(tmp_path):
    """``demo.sh`` in a repository of its own, where training, exporting and asking only say how they were called."""
    for name in ("deepspeed", "python"):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(STUB)
        (tmp_path / "bin" / name).chmod(0o755)
    for name in ("scripts/demo.sh", "playground/demo_inputs.sh"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text() if name == "scripts/demo.sh" else "")

    def start() -> list[str]:
        (tmp_path / "seen").write_text("")
        environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SEEN": str(tmp_path / "seen")}
        environment |= start.more
        subprocess.run(
            ["bash", str(tmp_path / "scripts" / "demo.sh")], env=environment, capture_output=True, check=False
        )
        return (tmp_path / "seen").read_text().splitlines()

    start.more, start.runs = {}, tmp_path / "playground" / "runs"
    return start


@pytest.mark.parametrize("saved", [[], [100], [500]])
def test_an_interrupted_demo_goes_on_training(demo, saved):
    for step in saved:
        (demo.runs / "demo" / f"checkpoint-{step}").mkdir(parents=True)
    (training,) = [line for line in demo() if line.startswith("deepspeed")]
    assert "--resume True" in training and "--overwrite" not in training


def test_a_finished_demo_trains_no_more(demo):
    (demo.runs / "demo" / "checkpoint-600").mkdir(parents=True)
    assert not [line for line in demo() if line.startswith("deepspeed")]


@pytest.mark.parametrize(("dies_at", "left"), [("2", 5), ("7", 1)])
def test_a_question_that_was_interrupted_is_asked_again(demo, dies_at, left):
    """The export goes well; the first or the last asking dies with half its answers written."""
    (demo.runs / "demo" / "checkpoint-600").mkdir(parents=True)
    demo.more["DIES_AT"] = dies_at
    assert "evaluate.py" in demo()[-1]
    del demo.more["DIES_AT"]
    asked = [line for line in demo() if "evaluate.py" in line or "ask_stock.py" in line]
    assert len(asked) == left and "--benchmark seed" in asked[-1]
    assert not [line for line in demo() if "evaluate.py" in line or "ask_stock.py" in line]
