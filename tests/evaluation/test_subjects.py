"""The subjects' data set, drawing, scores and the human evaluation, on tiny images and models."""

import importlib.util
import json
import re
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from llava_moslora.errors import Refusal
from llava_moslora.evaluation import human_kit
from llava_moslora.evaluation.subject_images import (
    LORA_FILE,
    Drawn,
    _missing,
    draw,
    load_pipeline,
    paired_images,
    planned,
    read_drawn,
)
from llava_moslora.evaluation.subject_scores import Encoders, compare_scores, load_encoders, score_folder
from llava_moslora.evaluation.subjects import read_subjects
from llava_moslora.models.names import SDXL_PARTS
from scripts import evaluate_subjects
from support.launching import ROOT
from support.sdxl import needs_diffusers, train, write_pictures, write_sdxl
from support.subjects import COLOURS, TEXT, write_clip_model, write_drawn, write_subjects, write_vit


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_subjects(tmp_path_factory.mktemp("dreambooth") / "dataset")


@pytest.fixture(scope="module")
def drawn(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    return write_drawn(folder / "a", data, fade=0.6), write_drawn(folder / "b", data, fade=0.1)


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["evaluate_subjects.py", *map(str, words)])
    evaluate_subjects.main()


def test_the_data_set_is_read_as_it_is(data):
    for folder in (data, data.parent):
        can, bear, cat = read_subjects(folder)
        assert (can.name, bear.class_word, cat.photos) == ("can", "stuffed animal", ("00.jpg", "01.jpg", "02.jpg"))
        assert can.prompts("sks") == ["a sks can in the jungle", "a red sks can"]
        assert cat.prompts("") == ["a cat wearing a red hat", "a red cat"]  # of live subjects, without the identifier
    assert [subject.name for subject in read_subjects(data, ["cat"])] == ["cat"]


def test_the_authors_prompts_by_a_file_of_ones_own(data, tmp_path):
    """The file as docs/evaluation.md has it."""
    text = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    (written,) = re.findall(r"```\n(Classes\n.*?)```", text, re.DOTALL)
    (tmp_path / "prompts_and_classes.txt").write_text(written)
    for name in ("cat", "grey_sloth_plushie"):
        shutil.copytree(data / "cat", tmp_path / name)
    cat, sloth = read_subjects(tmp_path)
    assert cat.prompts("ikat") == ["A picture of a ikat cat in the jungle", "A picture of a red ikat cat"]
    assert sloth.prompts("ikat")[0] == "A picture of a ikat grey sloth plushie in the jungle"


@pytest.mark.parametrize(
    "old, new, match",
    [("can,can", "can,can\ncan,tin", "twice"), ("can,can", "../x,can", "no subject and class"),
     ("'a red {0} {1}'", "'a red {0.__class__} {1}'", "line 14: not a"), ("{0} {1} in", "{0} in", "not a subject"),
     ("subject_name,class\ncan,can\nbear_plushie,stuffed animal\ncat,cat", "", "no subjects"),
     ("Object Prompts", "Objects", "line 10: not a subject"), ("can,can", "can", "not a subject")],
)  # fmt: skip
def test_a_file_of_another_form_is_one_line(tmp_path, old, new, match):
    assert old in TEXT
    with pytest.raises(Refusal, match=rf"D-PARSE\] .*prompts_and_classes.txt.*{match}"):
        read_subjects(write_subjects(tmp_path / "data", TEXT.replace(old, new, 1)))


def test_what_is_not_there_is_named(tmp_path, data):
    with pytest.raises(Refusal, match=r"D-FILE.*nothing is downloaded"):
        read_subjects(tmp_path)
    with pytest.raises(Refusal, match=r"C-FLAG\] --names: unknown subject; found dog; expected can"):
        read_subjects(data, ["dog"])
    folder = write_subjects(tmp_path / "data")
    for photo in (folder / "cat").iterdir():
        photo.unlink()
    with pytest.raises(Refusal, match=r"D-FILE.*no photos"):
        read_subjects(folder)


class FakePipeline:
    """Draws the first number of its generator as a colour."""

    def __init__(self, fail_at=None):
        self.unet, self.scheduler, self.prompts, self.fail_at = torch.nn.Linear(1, 1), object(), [], fail_at
        self.unet.dtype = torch.float32

    def __call__(self, prompt, *, generator, **_):
        if len(self.prompts) == self.fail_at:
            raise KeyboardInterrupt
        self.prompts.append(prompt)
        value = int(torch.randint(256, (1,), generator=generator))
        return type("Out", (), {"images": [Image.new("RGB", (8, 8), (value, 0, 0))]})


def test_drawing_goes_on_after_a_kill_and_starts_from_the_same_latents(data, tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model_index.json").write_text("{}")

    def start(output, pipeline, **other):
        how = {"identifiers": dict.fromkeys(COLOURS, "sks"), "loras": {}, "seeds": range(2), "base": tmp_path / "base",
               "steps": 2, "guidance": 5.0, "size": None}  # fmt: skip
        output.mkdir(exist_ok=True)
        draw(pipeline, read_subjects(data), output, **(how | other))
        return {p.name: p.read_bytes() for p in sorted(output.rglob("*.png"))}

    whole = start(tmp_path / "whole", FakePipeline())
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path / "killed", FakePipeline(fail_at=5))
    second = FakePipeline()
    assert start(tmp_path / "killed", second) == whole and len(second.prompts) == 12 - 5
    assert len(set(whole.values())) > 3  # other seeds and prompts, other latents
    assert second.prompts[-1] == "a red sks cat"
    a, b = read_drawn(tmp_path / "whole"), read_drawn(tmp_path / "killed")
    assert paired_images(a, b) == planned(read_subjects(data), range(2))
    with pytest.raises(Refusal, match=r"C-ANSWERS.*images.json:settings: .*another model or other settings"):
        start(tmp_path / "killed", FakePipeline(), steps=3)


def test_diffusers_is_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Refusal, match=r"E-MISSING.*diffusers.*pip install 'llava_moslora\[diffusion\]'"):
        load_pipeline("base", "float32")


def test_missing_tensors_are_found_in_a_report_for_a_terminal():
    """Coloured, and with one line for several layers."""
    red = "\x1b[31mMISSING\x1b[0m"
    rows = [f"layers.{{0, 1}}.weight | {red} |", "head.bias | MISSING |", "x | UNEXPECTED |"]
    report = "\n".join(["Key | Status", "--+--", *rows])
    parts = SimpleNamespace(**{name: torch.nn.Linear(1, 1) for name in (*SDXL_PARTS, "vae")})
    assert _missing(parts, [report]) == ["layers.{0, 1}.weight", "head.bias"]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A tiny SDXL; exports of a LoRA and a MoSLoRA trained on it; files with zero B, with mixers, of another model."""
    from llava_moslora.diffusion.export import export_lora

    folder = tmp_path_factory.mktemp("tuned")
    parts = SimpleNamespace(sdxl=write_sdxl(folder / "sdxl"), pictures=write_pictures(folder / "pictures", count=2))
    for name, how in {"lora": {"mixer_init": "identity", "train_mixer": False}, "moslora": {}}.items():
        train(parts, folder / f"{name}-run", max_steps=2, **how)
        setattr(parts, name, export_lora(folder / f"{name}-run", folder / name, prove=False))
    tensors = load_file(parts.lora / LORA_FILE)
    parts.untrained, parts.unfolded = folder / "untrained.safetensors", folder / "unfolded.safetensors"
    save_file({name: tensor * ("lora_B" not in name) for name, tensor in tensors.items()}, parts.untrained)
    one = next(name for name in tensors if "lora_A" in name)
    save_file(tensors | {one.replace("lora_A", "lora_mixer"): torch.eye(4)}, parts.unfolded)
    parts.foreign = folder / "foreign.safetensors"
    save_file({name.replace("unet.", "transformer."): tensor for name, tensor in tensors.items()}, parts.foreign)
    return parts


@needs_diffusers
def test_a_real_pipeline_draws_with_exports(data, tuned, tmp_path, monkeypatch):
    """From the same latents: B = 0 changes nothing; what was trained does, each method in its own way."""

    def start(output, lora=None):
        (tmp_path / output).mkdir(exist_ok=True)
        pipeline = load_pipeline(tuned.sdxl, "float32")
        assert pipeline.watermark is None
        draw(pipeline, read_subjects(data, ["cat"]), tmp_path / output, identifiers={"cat": "ikat"}, seeds=range(1),
             loras={} if lora is None else {"cat": lora}, base=tuned.sdxl, steps=2, guidance=5.0, size=64)  # fmt: skip
        files = sorted((tmp_path / output).rglob("*.png"))
        return np.array([np.asarray(Image.open(file), dtype=int) for file in files])  # (2, 64, 64, 3)

    base, untrained = start("base"), start("untrained", tuned.untrained)
    assert base.shape == (2, 64, 64, 3) and (base == untrained).all()
    lora, moslora = start("lora", tuned.lora), start("moslora", tuned.moslora)
    for one, other in ((base, lora), (base, moslora), (lora, moslora)):
        assert (abs(one - other).max(axis=(1, 2, 3)) > 0).all()
    assert len(paired_images(read_drawn(tmp_path / "lora"), read_drawn(tmp_path / "moslora"))) == 2

    calls: list[int] = []

    def killed(self, *args):
        calls.append(len(calls))
        if len(calls) == 2:
            raise KeyboardInterrupt
        saved(self, *args)

    saved = Image.Image.save
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Image.Image, "save", killed)
        start("killed", tuned.moslora)
    assert len(read_drawn(tmp_path / "killed").images) == 1
    assert (start("killed", tuned.moslora) == moslora).all()
    with pytest.raises(Refusal, match=r"K-ADAPTER.*contains mixers, which diffusers ignores.*lora_mixer.*export.py"):
        start("unfolded", tuned.unfolded)
    with pytest.raises(Refusal, match=r"K-ADAPTER.*not a LoRA of this model.*layers, of which 0 were loaded"):
        start("foreign", tuned.foreign)


def without(sdxl, part, end):
    """A copy of the model without a tensor of a part."""
    folder = sdxl.with_name(f"without-{part}")
    shutil.copytree(sdxl, folder)
    file = next((folder / part).glob("*.safetensors"))
    tensors = load_file(file)
    del tensors[next(name for name in sorted(tensors) if name.endswith(end))]
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


@needs_diffusers
def test_draw_prints_its_own_lines_and_checks_before_it_writes(data, tuned, tmp_path, monkeypatch, capfd):
    """A wrong base or LoRA leaves nothing behind."""
    words = ["draw", "--subjects", data, "--names", "cat", "--output", tmp_path / "out", "--seeds", 1, "--steps", 1,
             "--size", 64, "--dtype", "float32"]  # fmt: skip
    for base, lora, match in (
        (data, None, r"K-MISSING\] .*model_index.json"),
        (tuned.sdxl, data, r"K-MISSING\] .*--lora: no such file"),
        (tuned.sdxl, data / "cat" / "00.jpg", "not a safetensors file"),
        (tuned.sdxl, tuned.unfolded, "contains mixers"),
        (without(tuned.sdxl, "unet", "conv_in.bias"), None, r"K-KEYS\] .*--base: tensors .*found unet.conv_in.bias"),
        (without(tuned.sdxl, "text_encoder", "norm1.weight"), None, r"K-KEYS\] .*--base: tensors .*norm1.weight"),
    ):
        with pytest.raises(Refusal, match=match):
            run(monkeypatch, *words, "--base", base,
                *([] if lora is None else ["--lora", f"cat={lora}", "--identifier", "ikat"]))  # fmt: skip
        assert not (tmp_path / "out").exists()
    words[words.index("--output") + 1] = tmp_path / "file" / "out"
    (tmp_path / "file").write_text("")
    with pytest.raises(Refusal, match=r"C-OUTPUT\] .*/out:--output: this folder is not writable"):  # before the base
        run(monkeypatch, *words, "--base", data)
    words[words.index("--output") + 1] = tmp_path / "out"
    capfd.readouterr()
    evaluate_subjects.quiet_libraries()  # as the script does at its start
    run(monkeypatch, *words, "--base", tuned.sdxl, "--lora", f"cat={tuned.lora}", "--identifier", "ikat")
    printed = capfd.readouterr()
    lines = re.split(r"[\r\n]+", printed.out + printed.err)
    assert [line for line in lines if line and not line.startswith("images: ")] == [f"drawn: {tmp_path / 'out'}"]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """A tiny CLIP with its processor and tokenizer, and a tiny ViT, as folders."""
    folder = tmp_path_factory.mktemp("encoders")
    return write_clip_model(folder / "clip"), write_vit(folder / "vit")


def test_scores_by_hand(data, drawn):
    """An encoder whose vector is the mean colour: cosines worked out from the pixels."""

    def colours(images):
        means = np.array([np.asarray(image).reshape(-1, 3).mean(0) for image in images])
        return torch.nn.functional.normalize(torch.tensor(means, dtype=torch.float32), dim=-1)

    texts = lambda prompts: torch.nn.functional.normalize(torch.ones(len(prompts), 3), dim=-1)  # noqa: E731
    drawn_a = read_drawn(drawn[0])
    scores = score_folder(drawn_a, read_subjects(data), Encoders(colours, texts, None))
    image = Drawn("can", 1, "a red can", 1)
    photos = [np.asarray(photo).reshape(-1, 3).mean(0) for photo in read_subjects(data, ["can"])[0].images()]
    own = np.asarray(drawn_a.open(image)).reshape(-1, 3).mean(0)
    cosine = lambda x, y: x @ y / np.linalg.norm(x) / np.linalg.norm(y)  # noqa: E731
    expected = {"clip_i": 100 * np.mean([cosine(own, photo) for photo in photos]),
                "clip_t": 100 * cosine(own, np.ones(3))}  # fmt: skip
    assert scores[image] == pytest.approx(expected, rel=1e-5)


def test_the_difference_is_paired_and_over_subjects():
    images = [Drawn(subject, n, "", 0) for subject in ("x", "y", "z") for n in range(4)]
    a = {image: {"dino": 50.0 + 10 * ("xyz".index(image.subject))} for image in images}
    b = {image: {"dino": a[image]["dino"] + (2 if image.number else -4)} for image in images}
    found = compare_scores(a, b, tie=0.5)["dino"]
    assert (found.a, found.b, found.points, found.subjects) == (60.0, 60.5, 0.5, 3)
    assert (found.win, found.tie, found.loss) == (9, 0, 3)
    assert found.low < 0 < found.high  # three subjects prove little, though all have the same difference
    assert compare_scores(a, b, tie=3)["dino"].tie == 9


def test_score_prints_both_methods_and_the_difference(data, drawn, encoders, tmp_path, monkeypatch, capfd):
    run(monkeypatch, "score", *drawn, "--subjects", data, "--clip", encoders[0], "--dino", encoders[1],
        "--output", tmp_path)  # fmt: skip
    text, others = capfd.readouterr()
    assert all(line.startswith(tuple(map(str, drawn))) for line in re.split(r"[\r\n]+", others) if line)
    assert [text.count(metric) for metric in ("CLIP-I", "DINO", "CLIP-T")] == [2, 2, 2]  # scores, and their difference
    content = json.loads((tmp_path / "subjects.json").read_text())
    assert set(content["differences"]) == {"clip_i", "dino", "clip_t"} and len(content["scores"][0]) == 12
    clip_image = load_encoders(str(encoders[0]), None).clip_image
    folder, can = read_drawn(drawn[1]), read_subjects(data, ["can"])[0]
    first = folder.images[0]
    cosines = clip_image([folder.open(first)]) @ clip_image(can.images()).T
    assert content["scores"][1][0]["clip_i"] == pytest.approx(100 * float(cosines.mean()), rel=1e-5)


def test_an_encoder_without_some_of_its_weights_is_refused(encoders, tmp_path):
    """transformers would draw them at random. A ViT's pooler is not used: DINO's files have none."""
    shutil.copytree(encoders[1], tmp_path / "vit")
    tensors = load_file(tmp_path / "vit" / "model.safetensors")
    assert not any("pooler" in name for name in tensors)
    del tensors["layernorm.weight"]
    save_file(tensors, tmp_path / "vit" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Refusal, match=r"K-KEYS\] .*vit:layernorm.weight: 1 tensors are missing"):
        load_encoders(None, str(tmp_path / "vit"))
    with pytest.raises(Refusal, match=r"K-JSON\] .*model_type: a CLIP model; found clip; fix: give it as --clip"):
        load_encoders(None, str(encoders[0]))
    with pytest.raises(Refusal, match=r"K-JSON\] .*model_type: not a CLIP model; found vit; fix: give CLIP"):
        load_encoders(str(encoders[1]), None)
    with pytest.raises(Refusal, match=r"K-MISSING\] .*config.json:--dino: no such file"):
        load_encoders(None, str(tmp_path))


def test_the_kit_is_blind_and_counted_by_hand(data, drawn, tmp_path, monkeypatch, capsys):
    run(monkeypatch, "kit", *drawn, "--subjects", data, "--pairs", "2", "--output", tmp_path / "kit")
    page, key = (tmp_path / "kit" / "kit.html").read_text(), json.loads((tmp_path / "kit" / "key.json").read_text())
    assert page.count("<article") == 6 == len(key["pairs"]) and {pair["left"] for pair in key["pairs"]} == {"A", "B"}
    assert str(drawn[0]) not in page and str(drawn[1]) not in page and "http:" not in page
    assert len({pair["prompt"] for pair in key["pairs"] if pair["image"].startswith("cat")}) == 2
    left_of = {str(n): pair["left"] for n, pair in enumerate(key["pairs"], 1)}

    def answers(person, preferred):  # prefers a method in similarity; the prompts are alike
        said = {
            n: {"similarity": "left" if left == preferred else "right", "prompt": "same"} for n, left in left_of.items()
        }
        file = tmp_path / f"{person}.json"
        file.write_text(json.dumps({"kit": key["kit"], "person": person, "answers": said}))
        return file

    files = [answers("ada", "B"), answers("bob", "B"), answers("cy", "A")]
    run(monkeypatch, "count", tmp_path / "kit" / "key.json", *files, "--output", tmp_path / "human")
    found = json.loads((tmp_path / "human" / "human.json").read_text())["similarity"]
    assert (found["win"], found["tie"], found["judgements"]) == (pytest.approx(66.667, abs=1e-3), 0, 18)
    assert found["loss"] == pytest.approx(33.333, abs=1e-3) and found["low"] < found["points"] < found["high"]
    printed = capsys.readouterr().out
    assert "100.0" in printed and "3 raters" in printed
    with pytest.raises(Refusal, match=r"C-OUTPUT.*a kit already exists"):
        run(monkeypatch, "kit", *drawn, "--subjects", data, "--pairs", "2", "--output", tmp_path / "kit")
    with pytest.raises(Refusal, match=r"C-COMPARE.*second file of the same person"):
        human_kit.count_answers(tmp_path / "kit" / "key.json", [files[0], files[0]])
    other = json.loads(files[0].read_text()) | {"kit": "other"}
    files[1].write_text(json.dumps(other))
    with pytest.raises(Refusal, match=r"C-COMPARE.*answers to a different kit"):
        human_kit.count_answers(tmp_path / "kit" / "key.json", files)
    with pytest.raises(Refusal, match=r"K-MISSING\] .*kit: a folder, not a file; fix: give the key.json"):
        human_kit.count_answers(tmp_path / "kit", files)
    with pytest.raises(Refusal, match=r"K-MISSING\] .*images.json: no drawn images; fix: give a folder that .* wrote"):
        read_drawn(tmp_path / "kit")


def test_the_pigeonhole_interval_is_wider_than_one_of_independent_judgements():
    """People who disagree with each other on everything: the spread is between the people."""
    left = {str(n): "B" for n in range(20)}
    people = [{n: {"prompt": "left" if person % 2 else "right"} for n in left} for person in range(6)]
    found = human_kit._preference(left, people, "prompt", 0)
    alone = 2 * 196 * (1 / 120) ** 0.5  # 95 % of 120 independent judgements of ±100
    assert found.points == 0 and found.high - found.low > 2 * alone
    rng = np.random.default_rng(1)
    slow = [np.mean([2 * (p % 2) - 1 for p in rng.integers(0, 6, 6)]) * 100 for _ in range(20_000)]
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(slow, (0.025, 0.975))), abs=1)


@pytest.mark.parametrize(
    "people, pairs, choice, low, high",
    [
        # (1.96, the normal quantile, is 1.959964.) 6 of 6 for B, one more each way: 7/8 and 1/8;
        # 6/8 ± 1.96 √((1 − 36/64) / 8) = 0.75 ± 0.458346
        (6, 20, "left", 29.1654, 100.0),
        # 5 of 5 alike: 1/7 and 1/7; 0 ± 1.96 √(2/7 / 7) = ± 0.395973. 5 pairs judged by 9 people are the same
        (5, 8, "same", -39.5973, 39.5973),
        (9, 5, "same", -39.5973, 39.5973),
        # one person and 8 pairs, all for A: 1/10 and 9/10; −8/10 ± 1.96 √((1 − 64/100) / 10) = −0.8 ± 0.371877
        (1, 8, "right", -100.0, -42.8123),
        # one judgement: 2/3 and 1/3; 1/3 ± 1.96 √((1 − 1/9) / 3) = 0.333333 ± 1.066869
        (1, 1, "left", -73.3536, 100.0),
    ],
)
def test_judgements_that_are_all_alike_have_an_interval_too(people, pairs, choice, low, high):
    left = {str(n): "B" for n in range(pairs)}
    found = human_kit._preference(left, [{n: {"prompt": choice} for n in left}] * people, "prompt", 0)
    assert found.points == {"left": 100, "same": 0, "right": -100}[choice]
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-3), pytest.approx(high, abs=1e-3))


def test_methods_that_cannot_be_compared(data, drawn, tmp_path):
    a = read_drawn(drawn[0])
    other = read_drawn(write_drawn(tmp_path / "c", data, fade=0.2, settings={"steps": 9}))
    with pytest.raises(Refusal, match=r"C-COMPARE.*drawn with other settings"):
        paired_images(a, other)
    fewer = read_drawn(write_drawn(tmp_path / "d", data, fade=0.2, seeds=1))
    with pytest.raises(Refusal, match=r"C-COMPARE.*not the same images; found 6 that only one folder has"):
        paired_images(a, fewer)
    (tmp_path / "c" / "images.json").write_text('{"images": {"../x.png": {}}, "settings": {}}')
    with pytest.raises(Refusal, match=r"K-JSON.*not a list of drawn images"):
        read_drawn(tmp_path / "c")


@pytest.mark.parametrize(
    "words, match",
    [(["paint"], "unknown step"), (["draw"], "--base: missing"), (["score", "a", "--subjects", "s", "--pairs", "2"],
     "--pairs: has no effect with score"), (["kit", "a", "--subjects", "s", "--output", "o"], "two drawn folders"),
     (["count", "key.json"], "at least one file"), (["score", "a", "--subjects", "s", "--tie", "-1"], "out of range"),
     (["draw", "--base", "b", "--subjects", "s", "--output", "o", "--size", "100"], "multiple of 8"),
     (["draw", "--base", "b", "--subjects", "s", "--output", "o", "--lora", "x=y"], "one without the other"),
     (["draw", "--base", "b", "--subjects", "s", "--output", "o", "--lora", "x=y", "--identifier", " "], "empty word")],
)  # fmt: skip
def test_flags(words, match):
    with pytest.raises(Refusal, match=match):
        evaluate_subjects.parse(words)


def test_help_says_which_step_a_flag_belongs_to(capsys):
    """Every flag stands below its step, or below "several steps" with their names; what a step needs, beside it."""
    with pytest.raises(SystemExit):
        evaluate_subjects.parse(["--help"])
    parts = re.split(r"\n\n(draw|score|kit|count|several steps):\n", capsys.readouterr().out)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert list(sections) == [*evaluate_subjects.STEPS, "several steps"] and len(evaluate_subjects.FLAGS) == 16
    for name, step in evaluate_subjects.STEPS.items():
        assert all(f"--{flag}" in sections[name].splitlines()[0] for flag in step.needed)
        for flag in (*step.needed, *step.allowed):
            row = next(line for line in "\n".join([sections[name], sections["several steps"]]).splitlines()
                       if line.startswith(f"  --{flag} "))  # fmt: skip
            assert row in sections[name].splitlines() or name in row or flag == "names"
