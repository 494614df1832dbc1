import json

import pytest

from llava_moslora.errors import Refusal
from llava_moslora.models.llava_folder import name_parts
from llava_moslora.training import command_line
from llava_moslora.training.arguments import TrainingArguments
from llava_moslora.training.command_line import accumulation_steps
from llava_moslora.training.config_file import LARGEST
from llava_moslora.training.text_only import check_text_only


def parse(argv):
    """As the script does it, without a process group."""
    *settings, training = command_line.parse(argv)
    return *settings, TrainingArguments(**training)


def required(tmp_path) -> list[str]:
    return [
        *("--model_name_or_path", "llm", "--vision_tower", "clip", "--data_path", "d.json", "--image_folder", "i"),
        *("--output_dir", str(tmp_path / "run")),
    ]


def test_flags_land_in_their_groups(tmp_path):
    model, data, adapter, args = parse([*required(tmp_path), "--bits", "4", "--lora_r", "8", "--vision_lr", "1e-3"])
    assert (model.bits, data.image_folder, adapter.lora_r, args.vision_lr) == (4, "i", 8, 1e-3)


def test_defaults_are_the_papers_table_8(tmp_path):
    _, _, adapter, args = parse(required(tmp_path))
    assert (adapter.lora_r, adapter.lora_alpha, adapter.vision_lora_r, adapter.vision_lora_alpha) == (64, 128, 64, 16)
    assert (adapter.lora_dropout, adapter.mixer_init, adapter.train_mixer) == (0.05, "kaiming_uniform", True)
    assert (args.lr_scheduler_type, args.warmup_steps, args.max_grad_norm) == ("cosine", 0.03, 1.0)


def test_towers_follow_each_other_unless_told(tmp_path):
    _, _, adapter, _ = parse([*required(tmp_path), "--mixer_init", "orthogonal", "--vision_train_mixer", "False"])
    assert (adapter.llm.mixer_init, adapter.llm.train_mixer) == ("orthogonal", True)
    assert (adapter.vision.mixer_init, adapter.vision.train_mixer) == ("orthogonal", False)
    assert parse([*required(tmp_path), "--vision_lora_r", "0"])[2].vision is None


def test_command_line_wins_over_the_file(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("lora_r: 4\nlora_target_modules: [q_proj, v_proj]\nbf16: true\nlearning_rate: 1e-4\n")
    _, _, adapter, args = parse(["--config", str(file), *required(tmp_path), "--lora_r", "16"])
    assert (adapter.lora_r, adapter.lora_target_modules) == (16, ["q_proj", "v_proj"])
    assert (args.bf16, args.learning_rate) == (True, 1e-4)


# C1: an unknown key
@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--lora_rr", "8"], r"--lora_rr: unknown flag; fix: did you mean --lora_r\?"),
        (["--learnin_rate=1"], r"--learnin_rate: unknown flag; fix: did you mean --learning_rate\?"),
        (["--lora_r", "many"], "invalid int value: 'many'"),
        (["--bits", "5"], r"--bits: invalid choice: 5 \(choose from 16, 4\)"),
        (["--loss_average", "batch"], r"--loss_average: invalid choice: .*tokens.*micro_batch"),
        (["--recompute", "some"], r"--recompute: unknown mode; found some; expected auto \| none \| full"),
        (["--resume", "True", "--overwrite", "True"], "--resume, --overwrite: a run is either continued or deleted"),
        (["--ddp_timeout", "0"], r"--ddp_timeout: out of range; found 0; expected at least 1 second"),
        (["--ddp_timeout", str(10**30)], r"--ddp_timeout: out of range"),
        (["--bf16", "True", "--fp16", "True"], "inconsistent training arguments"),
        (["stray"], "a value without a flag; found stray"),
        (["--method", "qlora"], "--method: invalid choice: 'qlora' .*; fix: --method lora --bits 4$"),
        (["--method", "QMoSLoRA"], "fix: --method moslora --bits 4$"),
        (["--method", "mos"], r"fix: did you mean moslora\?$"),
        (["--load_in_4bit", "True"], "--load_in_4bit: unknown flag; fix: --bits 4$"),
    ],
)
def test_wrong_flags_are_answered(tmp_path, extra, message):
    with pytest.raises(Refusal, match=message) as refused:
        parse([*required(tmp_path), *extra])
    assert refused.value.code == "C-FLAG"


@pytest.mark.parametrize(
    "extra", [["--bits", "5"], ["--loss_average", "batch"], ["--recompute", "some"], ["--ddp_timeout", "0"]]
)
def test_a_bad_flag_is_refused_before_anything_looks_for_devices(tmp_path, extra):
    """So also before the ranks of a run meet."""
    with pytest.raises(Refusal, match="C-FLAG"):
        command_line.parse([*required(tmp_path), *extra])


def test_missing_flags_are_named():
    with pytest.raises(Refusal, match="--data_path"):
        parse(["--model_name_or_path", "x", "--output_dir", "y"])


def test_without_a_vision_tower_an_llm_is_trained_on_text(tmp_path):
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm" / "config.json").write_text('{"model_type": "llama"}')
    words = required(tmp_path)
    words = words[:2] + words[4:]
    words += ["--model_name_or_path", str(tmp_path / "llm")]
    model, data, adapter, training = command_line.parse(words)
    assert name_parts(model).text_only
    with pytest.raises(Refusal, match=r"--image_folder: has no effect without a vision tower.*give --vision_tower"):
        check_text_only(name_parts(model), data, adapter, training)


def test_missing_output_dir_is_named(tmp_path):
    with pytest.raises(Refusal, match="--output_dir"):
        parse(required(tmp_path)[:-2])


# C1: an unknown key
def test_unknown_key_in_a_file(tmp_path):
    file = tmp_path / "c.json"
    file.write_text(json.dumps({"vision_lora_rank": 4}))
    with pytest.raises(Refusal, match=r"c\.json:vision_lora_rank: unknown key; fix: did you mean --vision_lora_r\?"):
        parse(["--config", str(file), *required(tmp_path)])


def test_the_users_folder_in_paths(tmp_path, monkeypatch):
    """Shells leave ``~`` in quotes and after ``=``, and a YAML file has no shell."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.yaml").write_text(
        "model_name_or_path: ~/llm\neval_data_path: [~/v.json, named=~/w.json]\nversion: ~\n"
    )
    words = ["--config=~/c.yaml", "--output_dir", "~/run", "--data_path", "a~/b", "~/d.json", "--image_folder=~/i"]
    model, data, _, training = command_line.parse([*words, "--vision_tower", "open_clip:ViT@~/v.pt"])
    home = str(tmp_path)
    assert (model.model_name_or_path, model.vision_tower) == (f"{home}/llm", f"open_clip:ViT@{home}/v.pt")
    assert (data.data_path, data.image_folder) == (["a~/b", f"{home}/d.json"], f"{home}/i")
    assert data.eval_data_path == [f"{home}/v.json", f"named={home}/w.json"] and model.version is None
    assert training["output_dir"] == f"{home}/run"


def test_a_file_without_its_flag():
    with pytest.raises(Refusal, match=r"good\.yaml: a file without its flag; fix: give it as --config good\.yaml$"):
        parse(["good.yaml", "--lora_r", "8"])
    with pytest.raises(Refusal, match=r"found 8; fix: put its flag before it$"):
        parse(["8"])


LLAVA = """--lora_enable True --lora_r 128 --mm_projector_lr 2e-5 --version v1 --vision_tower clip --data_path d
    --mm_vision_select_layer -2 --mm_use_im_start_end False --image_aspect_ratio pad --bf16 True --output_dir o
    --group_by_modality_length True --evaluation_strategy no --warmup_ratio 0.03 --lazy_preprocess True"""
LLAMA_FACTORY = {
    "model_name_or_path": "m", "stage": "sft", "do_train": True, "finetuning_type": "lora", "lora_rank": 8,
    "lora_target": "all", "dataset": "mllm_demo", "template": "qwen2_vl", "cutoff_len": 2048, "plot_loss": True,
    "overwrite_cache": True, "overwrite_output_dir": True, "output_dir": "o", "nothing_like_it": 1,
}  # fmt: skip


def test_all_unknown_names_are_answered_at_once(tmp_path):
    with pytest.raises(Refusal) as refused:
        parse(LLAVA.split())
    assert refused.value.line() == (
        "error[C-FLAG] --lora_enable, --mm_vision_select_layer, --mm_use_im_start_end, --group_by_modality_length, "
        "--evaluation_strategy, --warmup_ratio, --lazy_preprocess: unknown flags; fix: --lora_enable: omit it: "
        "adapters are trained unless --lora_r is 0; --mm_vision_select_layer: omit it: features are from the "
        "penultimate layer; --mm_use_im_start_end: omit it; --group_by_modality_length: omit it: --data_order "
        "modality_length is the default; --evaluation_strategy: --eval_strategy; --warmup_ratio: --warmup_steps, below "
        "1 a share of all steps; --lazy_preprocess: omit it"
    )
    file = tmp_path / "sft.yaml"
    file.write_text("".join(f"{key}: {value}\n" for key, value in LLAMA_FACTORY.items()))
    with pytest.raises(Refusal) as refused:
        parse(["--config", str(file)])
    assert refused.value.what == "unknown keys" and refused.value.file == str(file)
    said = refused.value.line()
    parts = ["stage: omit it", "lora_rank: did you mean --lora_r?", "dataset: --data_path", "template: --version"]
    for part in [*parts, "cutoff_len: --model_max_length", "overwrite_output_dir: --overwrite"]:
        assert f"; {part}" in said or f"fix: {part}" in said, said
    assert "nothing_like_it" in said and "see --help" not in said
    many = [word for k in range(20) for word in (f"--qqqq{k}zz", "1")]
    with pytest.raises(Refusal, match=r"--qqqq11zz and 8 more: unknown flags; fix: see --help$"):
        parse([*required(tmp_path), *many])


@pytest.mark.parametrize("text", ["2025_11_03", "0012", "1:30", "2025-11-03", "no", "on", "1e3", "0x10", ".5", "="])
def test_a_text_in_the_file_is_what_is_written(tmp_path, text):
    """YAML 1.1 makes a number, a time or a truth value of most of these."""
    file = tmp_path / "c.yaml"
    file.write_text(f"output_dir: {text}\nrun_name: '{text}'\ndata_path: [{text}]\nreport_to: wandb\n")
    _, data, _, args = parse([*required(tmp_path)[:4], "--config", str(file)])
    assert [args.output_dir, args.run_name, data.data_path] == [text, text, [text]]


def test_numbers_truth_values_and_mappings_in_the_file(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(
        "lora_r: 0012\nlearning_rate: 1e-4\nmixer_lr: 2.5e-4\nbf16: yes\nwarmup_steps: 0.1\ndata_weights: [1, .5]\n"
        "save_strategy: no\nsample_questions: ''\nlr_scheduler_kwargs: {a: 1, b: [no, 2.5, null, '3'], c: TRUE}\n"
    )
    _, data, adapter, args = parse([*required(tmp_path), "--config", str(file)])
    assert (adapter.lora_r, args.learning_rate, args.mixer_lr, args.bf16) == (12, 1e-4, 2.5e-4, True)
    assert (args.warmup_steps, data.data_weights, args.save_strategy, args.sample_questions) == (
        0.1,
        [1, 0.5],
        "no",
        "",
    )
    assert args.lr_scheduler_kwargs == {"a": 1, "b": ["no", 2.5, None, "3"], "c": True}
    file.write_text(
        json.dumps({"lora_r": 12, "bf16": True, "lr_scheduler_kwargs": {"a": "no"}, "image_folder": "null"})
    )
    _, data, adapter, args = parse([*required(tmp_path)[:6], "--config", str(file), "--output_dir", str(tmp_path)])
    assert (adapter.lora_r, args.bf16, args.lr_scheduler_kwargs, data.image_folder) == (12, True, {"a": "no"}, "null")


@pytest.mark.parametrize("null", ["null", "~", "", "Null"])
def test_null_is_a_flag_that_is_not_given(tmp_path, null):
    file = tmp_path / "c.yaml"
    names = ("deepspeed", "pretrain_mm_mlp_adapter", "report_to", "image_folder", "vision_lr", "lora_r", "data_weights")
    file.write_text("".join(f"{name}: {null}\n" for name in names))
    words = required(tmp_path)
    assert parse([*words[:6], *words[8:], "--config", str(file)]) == parse([*words[:6], *words[8:]])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"lora_r: 4\nlora_r: 8\n", r"c\.yaml:lora_r: the key occurs twice; found lines 1 and 2; fix: keep one"),
        (b'{"lora_r": 4, "lora_r": 4}', r"c\.yaml:lora_r: the key occurs twice"),
        (b"lr_scheduler_kwargs: {a: 1, a: 2}", r"c\.yaml:a: the key occurs twice"),
        ("run_name: caf\xe9\n".encode("latin-1"), r"C-PARSE\] .*not UTF-8; found byte 0xe9 at 13; fix: save .* UTF-8"),
        ("run_name: a\n".encode("utf-16"), r"C-PARSE\] .*not UTF-8; found byte 0xff at 0; fix: save the file as UTF-8"),
        ("run_name: a\n".encode("utf-16-le"), r"C-PARSE\] .*neither YAML nor JSON"),
        (b"", r"not a mapping of flags to values; found nothing"),
        (b"- lora_r", r"not a mapping of flags to values; found sequence"),
        (b"lora_r: !!int 4", r"neither YAML nor JSON; found the tag tag:yaml.org,2002:int, which is not supported"),
        (b"data_path: [a, null]", r"data_path: a list holds plain values only; found null"),
        (b"data_path: [[a]]", r"data_path: a list holds plain values only; found sequence"),
        (b"[a]: b", r"a key that is not text; found line 1"),
        (b"[" * 9000, r"neither YAML nor JSON; found too many brackets inside each other$"),
        (b"a: 1\nb: [1, 2\n", r"neither YAML nor JSON; found line 3, column 1: while parsing a flow sequence"),
        (b"a: 1\n  b: 2\n", r"neither YAML nor JSON; found line 2, column 4: mapping values are not allowed here$"),
        (b"a: '\x01'\n", r"neither YAML nor JSON; found unacceptable character #x0001: [^\\]*$"),
        (b"#" * (LARGEST + 1), rf"C-PARSE\] .*too large; found {LARGEST + 1} bytes; expected at most {LARGEST} bytes"),
    ],
)
def test_files_that_cannot_be_read_as_written(tmp_path, content, message):
    file = tmp_path / "c.yaml"
    file.write_bytes(content)
    with pytest.raises(Refusal, match=message) as refusal:
        parse([*required(tmp_path), "--config", str(file)])
    assert refusal.value.line().isprintable()


def test_a_file_with_a_byte_order_mark(tmp_path):
    (tmp_path / "c.yaml").write_text("lora_r: 4\n", encoding="utf-8-sig")
    assert parse([*required(tmp_path), "--config", str(tmp_path / "c.yaml")])[2].lora_r == 4


# C16: YAML that builds objects
def test_yaml_that_builds_objects_is_refused(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("lora_r: !!python/object/apply:os.getpid []\n")
    with pytest.raises(Refusal, match="neither YAML nor JSON"):
        parse(["--config", str(file), *required(tmp_path)])


@pytest.mark.parametrize(("line", "message"), [
    ("max_steps: two", r"c\.yaml:max_steps: invalid int value: 'two'; fix: see --help$"),
    ("bits: 5", r"c\.yaml:bits: invalid choice: 5"),
    ("recompute: some", r"c\.yaml:recompute: unknown mode"),
    ("push_to_hub: true", r"c\.yaml:push_to_hub: nothing is uploaded while training"),
    ("ddp_timeout: 0", r"c\.yaml:ddp_timeout: out of range"),
])  # fmt: skip
def test_a_wrong_value_of_a_file_names_the_file(tmp_path, line, message):
    (tmp_path / "c.yaml").write_text(f"{line}\n")
    with pytest.raises(Refusal, match=message):
        parse([*required(tmp_path), "--config", str(tmp_path / "c.yaml")])
    (tmp_path / "c.yaml").write_text("max_steps: 2\n")
    with pytest.raises(Refusal, match=r"C-FLAG\] --max_steps: invalid int value: 'three'"):
        parse([*required(tmp_path), "--config", str(tmp_path / "c.yaml"), "--max-steps=three"])


# C8: a DeepSpeed file that is missing or broken
def test_deepspeed_file_is_looked_at_first(tmp_path):
    with pytest.raises(Refusal, match=r"nowhere\.json:--deepspeed: no such file"):
        parse([*required(tmp_path), "--deepspeed", "nowhere.json"])
    with pytest.raises(Refusal, match=r"--deepspeed: no such file"):  # "$ZERO" with the variable unset
        parse([*required(tmp_path), "--deepspeed", ""])
    file = tmp_path / "ds.json"
    for text, said in {
        '{"zero_optimization": {"stage": 2,}}': "not JSON; found line 1",
        '{"zero_optimization": {}, "zero_optimization": {}}': "not usable; found the key 'zero_optimization' occurs",
        '{"gradient_clipping": NaN}': "not usable; found NaN is not a JSON value",
    }.items():
        file.write_text(text)
        with pytest.raises(Refusal, match=rf"C-PARSE\] .*ds\.json:--deepspeed: {said}"):
            parse([*required(tmp_path), "--deepspeed", str(file)])


@pytest.mark.parametrize(("n", "per_device", "ranks", "steps"), [(64, 8, 4, 2), (64, 8, 8, 1), (64, 4, 1, 16)])
def test_accumulation_follows_from_the_global_batch(n, per_device, ranks, steps):
    assert accumulation_steps(n, per_device, ranks) == steps


@pytest.mark.parametrize(
    ("n", "per_device", "ranks", "message"),
    [
        (64, 8, 3, r"found 64; expected a multiple of 24 = 8 per device × 3 ranks; fix: --global_batch_size 48 or 72$"),
        (64, 8, 6, r"fix: --global_batch_size 48 or 96$"),
        (64, 16, 8, r"fix: --global_batch_size 128, or --per_device_train_batch_size 8$"),
        (40, 16, 2, r"fix: --global_batch_size 32 or 64, or --per_device_train_batch_size 10$"),
        (0, 8, 1, r"found 0; .*fix: --global_batch_size 8$"),
        (-64, 8, 1, r"found -64"),
    ],
)
def test_a_global_batch_that_does_not_divide_is_refused(n, per_device, ranks, message):
    with pytest.raises(Refusal, match=r"C-FLAG\] --global_batch_size: not a multiple .*" + message):
        accumulation_steps(n, per_device, ranks)


def test_the_global_batch_and_its_parts_agree(tmp_path):
    words = [*required(tmp_path), "--per_device_train_batch_size", "2"]
    args = parse(words)[3]
    assert (args.gradient_accumulation_steps, args.global_batch_size) == (1, 2)
    args = parse([*words, "--gradient_accumulation_steps", "3"])[3]
    assert (args.gradient_accumulation_steps, args.global_batch_size) == (3, 6)
    args = parse([*words, "--global_batch_size", "8"])[3]
    assert (args.gradient_accumulation_steps, args.global_batch_size) == (4, 8)
    assert parse([*words, "--global_batch_size", "8", "--gradient_accumulation_steps", "4"])[3] == args
    contradicting = r"--global_batch_size, --gradient_accumulation_steps: .*found 8 and 1; expected 8 = 2 .* × 4 accum"
    with pytest.raises(Refusal, match=contradicting):
        parse([*words, "--global_batch_size", "8", "--gradient_accumulation_steps", "1"])


def test_one_process_does_not_share_its_batches_with_several_gpus(tmp_path, monkeypatch):
    """As transformers would, in DataParallel, where no launcher was used; positions of labels are the whole batch's."""
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(Refusal, match=r"E-LAUNCH\] one process that sees several GPUs; found 2 GPUs; fix: .*torchrun"):
        parse(required(tmp_path))
