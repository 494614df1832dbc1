"""The report of a prepared data set, its page, and the script that writes them."""

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from llava_moslora.config import DataSettings
from llava_moslora.data.report import data_report, histogram, padding_waste, write_report
from llava_moslora.data.sampler import GlobalBatchSampler
from llava_moslora.errors import Refusal
from scripts import prepare_data

SCRIPT = Path(__file__).parents[2] / "scripts/prepare_data.py"


def talk(question, answer, image=None, id="r"):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": id, **({"image": image} if image else {}), "conversations": turns}


@pytest.fixture
def dataset(prepare_files, write_json, image_folder):
    (image_folder / "coco").mkdir()
    (image_folder / "coco/a.png").write_bytes((image_folder / "1.png").read_bytes())
    records = [talk("<image>\nWhat?", "x" * k, "coco/a.png", k) for k in range(1, 7)]
    records += [talk("<image>\nWhat?", "<script>alert(1)</script>", "2.png", "<b>"), talk("hi", "y" * 60, id="t")]
    records += [talk("<image>\nWhat?", "no", "gone.png"), talk("q" * 300, "a")]
    quarantine = {"on_bad_record": "quarantine", "max_bad_share": 0.5}
    return prepare_files(write_json(records), image_folder, model_max_length=100, **quarantine)


@pytest.fixture
def settings(image_folder):
    return DataSettings(["data.json"], image_folder=str(image_folder))


def test_report(dataset, settings):
    report = data_report(dataset, settings=settings, batch_size=2)
    assert {k: report[k] for k in ("records", "kept", "with_images", "images", "left_out", "batch_size")} == {
        "records": 10, "kept": 8, "with_images": 7, "images": 7, "left_out": 1, "batch_size": 2
    }  # fmt: skip
    assert {name: row["records"] for name, row in report["sources"].items()} == {"coco": 6, ".": 1, "text": 1}
    assert sum(row["tokens"] for row in report["sources"].values()) == report["tokens"] == sum(dataset["length"])
    assert sum(row["trained"] for row in report["sources"].values()) == report["trained_tokens"]
    assert report["truncated_share"] == 0.1
    assert sum(report["lengths"]["with images"]["counts"]) == 7
    assert sum(report["trained_per_record"]["all"]["counts"]) == 8
    assert set(report["padding_waste"]) == {"shuffle", "modality_length"}
    assert report["problems"][0]["refusal"]["code"] == "I-MISSING"


def test_what_is_held_out_is_not_counted_as_trained(dataset, settings, tiny, tmp_path):
    """Rows 1 and 7 are validation data: the report is that of the others, and says how many they are."""
    rows = np.array([0, 2, 3, 4, 5, 6])
    report = data_report(dataset, settings=settings, batch_size=2, rows=rows)
    assert {k: report[k] for k in ("records", "kept", "held_out", "with_images", "images")} == {
        "records": 10, "kept": 6, "held_out": 2, "with_images": 6, "images": 6
    }  # fmt: skip
    lengths = np.asarray(dataset["length"][:])
    assert report["tokens"] == lengths[rows].sum() < lengths.sum()
    assert report["trained_tokens"] == np.asarray(dataset["trained"][:])[rows].sum()
    assert {name: row["records"] for name, row in report["sources"].items()} == {"coco": 5, ".": 1}
    (file,) = report["files"]
    assert (file["kept"], file["held_out"], file["seen_per_epoch"]) == (6, 2, 6)
    assert sum(report["trained_per_record"]["all"]["counts"]) == 6
    how = {"settings": settings, "tokenizer": tiny("chatml"), "batch_size": 2}
    page = Page()
    page.feed(write_report(tmp_path / "r", dataset, rows=rows, **how).read_text())
    assert "2held out" in page.text and "6 records, drawn at random" in page.text and "record 7" not in page.text
    assert "held out" not in write_report(tmp_path / "all", dataset, **how).read_text()


def test_padding_waste_by_hand():
    sampler = GlobalBatchSampler([1, 3, 2, 2], [True] * 4, per_device_batch_size=2, order="sequential")
    assert padding_waste(sampler, [1, 3, 2, 2]) == pytest.approx(1 - 8 / 10)


def test_histogram_keeps_everything():
    found = histogram(np.array([0, 1, 50, 99, 100, 1000]), 100)
    assert sum(found["counts"]) == 6
    assert found["counts"][-1] == 3
    assert (found["edges"][0], found["edges"][-1]) == (0, 100)


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.text, self.sources = [], "", []

    def handle_starttag(self, tag, attrs):
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "rect", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        self.text += data


def test_page(dataset, settings, tiny, tmp_path):
    path = write_report(
        tmp_path / "report", dataset, settings=settings, tokenizer=tiny("chatml"), batch_size=2, title="T & T"
    )
    expected = data_report(dataset, settings=settings, batch_size=2)
    assert json.loads((tmp_path / "report/report.json").read_text()) == expected
    content = path.read_text()
    page = Page()
    page.feed(content)
    assert "<script" not in content  # what a record says is shown, not run
    assert all(source.startswith("data:image/jpeg;base64,") for source in page.sources)  # nothing is fetched
    assert len(page.sources) == 7
    for text in (
        "T & T",
        "<script>alert(1)</script>",
        "<image>×4",
        "coco/a.png",
        "Problems: 1 × I-MISSING",
        "gone.png",
    ):
        assert text in page.text
    assert content.count('<span class="trained">') == 8


def run_script(*arguments):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=SCRIPT.parents[1], timeout=600)


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/report"])
def test_a_report_folder_that_cannot_be_is_refused_before_the_work(parts, tmp_path, monkeypatch, place):
    (tmp_path / "file").write_text("")
    words = ["--model_name_or_path", parts.llm, "--vision_tower", parts.clip, "--data_path", parts.data]
    words += ["--image_folder", parts.images, "--data_cache", tmp_path / "cache", "--report_dir", tmp_path / place]
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", *map(str, words)])
    with pytest.raises(Refusal, match=rf"C-PATH\] .*{place}:--report_dir: the report cannot be written there; found "):
        prepare_data.main()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.slow  # the imports of a new process
def test_script(parts, tmp_path):
    arguments = ["--model_name_or_path", parts.llm, "--vision_tower", parts.clip, "--data_path", parts.data,
                 "--image_folder", parts.images, "--data_cache", tmp_path / "cache",
                 "--per_device_train_batch_size", 4, "--report_dir", tmp_path / "report"]  # fmt: skip
    done = run_script(*arguments)
    assert done.returncode == 0, done.stderr
    assert "conversation template: chatml" in done.stdout
    assert "records: 16  kept: 16" in done.stdout
    assert (tmp_path / "report/report.html").is_file()
    wrong = run_script(*arguments[:-4], "--no_such_flag", "x")
    assert wrong.returncode == 2
    assert wrong.stderr.strip().splitlines()[-1].startswith("error[C-FLAG]")
    assert "Traceback" not in wrong.stderr
