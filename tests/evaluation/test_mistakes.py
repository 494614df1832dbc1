"""The page of mistakes: what it shows is what was scored, nothing in it runs, and it stays small."""

import base64
import hashlib
import io
import json
import re
import tracemalloc
from collections import Counter
from html.parser import HTMLParser

import pytest
from PIL import Image

from llava_moslora import pages
from llava_moslora.errors import Refusal
from llava_moslora.evaluation import mistakes_page
from llava_moslora.evaluation.benchmarks import BENCHMARKS
from llava_moslora.evaluation.checks import open_benchmark
from llava_moslora.evaluation.mistakes import Answered, answered_by_both, choose
from llava_moslora.evaluation.mistakes_page import LONGEST_TEXT, SCRIPT, write_page
from llava_moslora.evaluation.prompts import prompt
from llava_moslora.evaluation.reading import RULES
from llava_moslora.evaluation.results import Result, read_results
from llava_moslora.evaluation.scoring import score
from support.evaluations import FILES, evaluated, write_data

NAMES = ("mmbench_en", "seed", "textvqa", "mathvista", "mmvet", "mme")
HOSTILE = '</td></table></article><script>alert(1)</script><img src="http://x/y" onerror=alert(1)> & "quoted" \'x\''
VOID = {"meta", "img", "input"}


class Page(HTMLParser):
    """The articles of a page: attributes, images, prompt, rows of their table; and every tag and script."""

    def __init__(self, text):
        super().__init__()
        self.articles, self.tags, self.scripts, self.options, self.text, self.rows = [], [], [], [], [], []
        self.open, self.cells = [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "article":
            self.articles.append({"data": dict(attrs), "images": [], "prompt": "", "rows": []})
        elif tag == "img":
            self.articles[-1]["images"].append(dict(attrs)["src"])
        elif tag == "option":
            self.options.append([dict(attrs)["value"], ""])
        elif tag == "script":
            self.scripts.append("")
        elif tag == "tr":
            self.cells = []
        elif tag in ("td", "th"):
            self.cells.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass
        if tag == "tr":
            (self.articles[-1]["rows"] if self.articles else self.rows).append(self.cells)

    def handle_data(self, data):
        inside = self.open[-1] if self.open else ""
        if inside == "script":
            self.scripts[-1] += data
        elif inside in ("td", "th"):
            self.cells[-1] += data
        elif inside == "option":
            self.options[-1][1] += data
        elif inside == "p" and self.articles:
            self.articles[-1]["prompt"] += data
        elif inside == "p":
            self.text.append(data)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), NAMES)


@pytest.fixture(scope="module")
def output(data, tmp_path_factory):
    return evaluated(tmp_path_factory.mktemp("a") / "out", data, NAMES)


@pytest.fixture(scope="module")
def other(data, tmp_path_factory):
    """Another model: right on every third question of SEED, hostile on one."""
    rows = open_benchmark(BENCHMARKS["seed"], data).rows
    changes = {("seed", row["index"]): row["answer"] for row in rows[::3]} | {("seed", rows[1]["index"]): HOSTILE}
    return evaluated(tmp_path_factory.mktemp("b") / "out", data, NAMES, changes)


def chosen(output, data, limit=10_000, names=NAMES):
    results = read_results(output)
    tables = {name: open_benchmark(BENCHMARKS[name], data) for name in names}
    return [choose(Answered.read(table, [output / n], [results[n]]), limit) for n, table in tables.items()]


def page_of(tmp_path, of, **how):
    write_page(tmp_path / "mistakes.html", "Mistakes of a", of, **how)
    assert [file.name for file in tmp_path.iterdir()] == ["mistakes.html"]
    return Page((tmp_path / "mistakes.html").read_text(encoding="utf-8"))


def test_every_answer_that_is_not_right_is_there(output, data, tmp_path):
    """Counted against the scores, benchmark by benchmark; what needs a judge is counted, and not shown."""
    page, results = page_of(tmp_path, chosen(output, data)), read_results(output)
    head, *rows = page.rows
    assert head == ["answers", "unread", "wrong", "partly right", "right", "needs a judge", "on this page"]
    for name, row in zip(NAMES, rows, strict=True):
        outcomes = results[name].score.outcomes
        if name == "mmvet":
            assert row[1:] == ["0", "0", "0", "0", str(len(outcomes)), "0"]
            continue
        unread = sum(outcome.rule == "unread" for outcome in outcomes)
        right = sum(outcome.right == 1 for outcome in outcomes)
        partly = sum(0 < outcome.right < 1 for outcome in outcomes)
        wrong = len(outcomes) - unread - right - partly
        expected = Counter({"unread": unread, "wrong": wrong, "partly right": partly, "right": right})
        found = Counter(a["data"]["data-state"] for a in page.articles if a["data"]["data-benchmark"] == name)
        assert found == +expected and row[1:] == [*map(str, (unread, wrong, partly, right)), "0", str(len(outcomes))]
    assert all(("hidden" in a["data"]) == (a["data"]["data-state"] == "right") for a in page.articles)
    assert (
        f"All {sum(a['data']['data-state'] != 'right' for a in page.articles)} answers that are not right." in page.text
    )


def test_an_article_shows_image_prompt_answer_reading_and_truth(output, data, tmp_path):
    page = page_of(tmp_path, chosen(output, data, names=["seed", "mathvista", "textvqa", "mme"]))
    tables = {name: open_benchmark(BENCHMARKS[name], data) for name in NAMES}
    results, numbers = read_results(output), dict.fromkeys(NAMES, 0)
    for article in page.articles:
        name = article["data"]["data-benchmark"]
        number, row = numbers[name], tables[name].rows[numbers[name]]  # all are there, in the file's order
        numbers[name] += 1
        outcome, kind = results[name].score.outcomes[number], BENCHMARKS[name].kind
        assert article["prompt"] == prompt(row, kind, "prompts-2024")
        (_, answered), (_, read), (_, truth) = article["rows"]
        given = FILES[BENCHMARKS[name].file][1][row["index"]]
        assert answered == (given or "(nothing)")
        assert (f"rule: {outcome.rule}; " in read) == (outcome.rule != "unread")
        assert ("no rule could parse it" in read) == (outcome.rule == "unread")
        if name == "seed":
            assert (
                truth == f"{row['answer']}. {row[row['answer']]}"
                and article["data"]["data-category"] == row["category"]
            )
            assert outcome.rule == "unread" or read.startswith(f"{outcome.read}. {row[outcome.read]} (")
        elif name == "mathvista" and row["question_type"] == "multi_choice":
            assert truth == f"{row['answer_option']}. {row['answer']}"
        elif name == "mme":
            assert truth == row["answer"] and article["data"]["data-category"] == row["category"]
        [source] = article["images"]
        kind, _, code = source.partition(";base64,")
        with Image.open(io.BytesIO(base64.b64decode(code))) as image:
            assert kind == "data:image/jpeg" and image.size == tables[name].images(number)[0].size
    assert all(numbers[name] == len(tables[name]) for name in ("seed", "mathvista", "textvqa", "mme"))


def test_the_truth_of_several_people(output, data, tmp_path):
    page = page_of(tmp_path, chosen(output, data, names=["textvqa"]))
    row = open_benchmark(BENCHMARKS["textvqa"], data).rows[0]
    counts = Counter(eval(row["answer"]))
    assert page.articles[0]["rows"][-1] == ["truth", ", ".join(f"{text} × {n}" for text, n in counts.most_common())]


def test_nothing_in_an_answer_or_a_file_runs(data, tmp_path):
    """Hostile text in answer, question, option and category comes out as text; the browser is told the one script."""
    folder = tmp_path / "data"
    folder.mkdir()
    text = FILES["SEEDBench_IMG"][0].replace("category 1", 'c" onclick="alert(1)').replace("category 2", HOSTILE)
    (folder / "SEEDBench_IMG.tsv").write_text(text.replace("dark red", "<b onclick=x>"), encoding="utf-8")
    table = open_benchmark(BENCHMARKS["seed"], folder)
    answers = {row["index"]: HOSTILE for row in table.rows}
    header = {"benchmark": "seed", "data": table.md5, "prompts": "prompts-2024", "limit": None}
    (tmp_path / "out").mkdir()
    lines = [{"header": header}, *({"index": index, "answer": answer} for index, answer in answers.items())]
    (tmp_path / "out" / "answers-0.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = Result(header, score("multiple-choice", table.rows, answers, RULES["rules-2024"]))
    (tmp_path / "page").mkdir()
    write_page(tmp_path / "page" / "m.html", HOSTILE, [choose(Answered.read(table, [tmp_path / "out"], [result]), 100)])
    page = Page((tmp_path / "page" / "m.html").read_text(encoding="utf-8"))
    assert page.scripts == [SCRIPT]
    assert len(page.articles) == 60 and all(article["rows"][0] == ["answered", HOSTILE] for article in page.articles)
    assert {'c" onclick="alert(1)', HOSTILE} < {article["data"]["data-category"] for article in page.articles}
    assert any("<b onclick=x>" in article["prompt"] for article in page.articles)
    known = {"data-benchmark", "data-category", "data-state", "hidden"}
    assert all(set(article["data"]) <= known for article in page.articles)
    assert all(source.startswith("data:image/jpeg;base64,") for a in page.articles for source in a["images"])
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert not {"a", "link", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.tags}
    [policy] = [a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a]
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_the_filters(output, data, tmp_path):
    """Options for every benchmark and state; the script names no data attribute that the articles do not have."""
    page = page_of(tmp_path, chosen(output, data, names=["seed", "textvqa"]))
    states = Counter(article["data"]["data-state"] for article in page.articles)
    options = dict(map(tuple, page.options))
    assert options["seed"] == "SEED-Bench image" and options["textvqa"] == "TextVQA"
    assert options["unread|wrong|partly right"] == f"not right ({states.total() - states['right']})"
    assert all(options[state] == f"{state} ({count})" for state, count in states.items())
    named = set(re.findall(r"dataset\.(\w+)", SCRIPT))
    assert named == {"benchmark", "category", "state"} and all(
        {f"data-{name}" for name in named} <= set(article["data"]) for article in page.articles
    )
    fields = [attributes["name"] for tag, attributes in page.tags if tag in ("select", "input")]
    assert fields == ["benchmark", "category", "state", "text"]


def test_a_limit_is_kept_and_said(output, data, tmp_path):
    of = chosen(output, data, 20, names=["seed", "mathvista", "mme"])
    page = page_of(tmp_path, of, missing=["ai2d", "sciqa"])
    for one in of:
        found = Counter(
            article["data"]["data-state"]
            for article in page.articles
            if article["data"]["data-benchmark"] == one.answered.benchmark.name
        )
        assert found["right"] == 2 and found.total() - 2 == min(20, one.needed)
    there, shown = sum(one.needed for one in of), sum(min(20, one.needed) for one in of)
    assert page.text == [
        f"{shown} of {there} answers that are not right, sampled with a fixed seed. {there - shown} are"
        f" left out: --mistakes {max(one.needed for one in of)} shows all.",
        "6 right answers are included for comparison; the filter shows them.",
        "Not on this page, because their files were not read: ai2d, sciqa.",
    ]
    assert [one.numbers for one in of] == [
        o.numbers for o in chosen(output, data, 20, names=["seed", "mathvista", "mme"])
    ]
    more = chosen(output, data, max(one.needed for one in of), names=["seed", "mathvista", "mme"])
    assert all(set(few.numbers) <= set(many.numbers) for few, many in zip(of, more, strict=True))
    assert page_of(tmp_path, more).text[0] == f"All {there} answers that are not right."


def test_long_texts_are_cut_and_say_so(data, tmp_path):
    row = open_benchmark(BENCHMARKS["seed"], data).rows[0]
    output = evaluated(tmp_path / "out", data, NAMES, {("seed", row["index"]): "<b>" * 14_000})
    (tmp_path / "page").mkdir()
    article = page_of(tmp_path / "page", chosen(output, data, names=["seed"])).articles[0]
    assert article["rows"][0][1] == ("<b>" * 14_000)[:LONGEST_TEXT] + "… (40,000 more characters)"


def test_one_image_and_one_answer_in_memory(output, data, tmp_path, monkeypatch):
    """A page of 60 MB and more is written in a few MB."""
    of = chosen(output, data, names=["seed"])
    monkeypatch.setattr(pages, "thumbnail", lambda image, side: f"<img src='{'x' * 10**6}'>")
    tracemalloc.start()
    write_page(tmp_path / "mistakes.html", "Mistakes", of)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (tmp_path / "mistakes.html").stat().st_size > 60e6 and peak < 12e6


def test_images_are_small(output, data, tmp_path, monkeypatch):
    table = open_benchmark(BENCHMARKS["seed"], data)
    large = Image.effect_noise((3000, 1500), 50).convert("RGB")
    monkeypatch.setattr(type(table), "images", lambda self, number: [large, "never looked at"])
    source = mistakes_page._image(table, 0)
    assert "width=224 height=112" in source and len(source) < 60_000


def test_an_image_that_cannot_be_read_now_is_named(output, data, tmp_path, monkeypatch):
    of = chosen(output, data, names=["seed"])

    def gone(self, number):
        raise Refusal("I-MISSING", "no such <image>", file="images/1.png")

    monkeypatch.setattr(type(of[0].answered.table), "images", gone)
    page = page_of(tmp_path, of)
    assert page.articles[0]["prompt"].startswith("error[I-MISSING] images/1.png: no such <image>")


def test_an_unfinished_page_does_not_replace_the_last_one(output, data, tmp_path, monkeypatch):
    (tmp_path / "mistakes.html").write_text("the last one")
    monkeypatch.setattr(mistakes_page, "_article", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_page(tmp_path / "mistakes.html", "Mistakes", chosen(output, data, names=["seed"]))
    assert (tmp_path / "mistakes.html").read_text() == "the last one"


def test_what_only_one_of_two_models_got_right(output, other, data, tmp_path):
    both = [read_results(folder) for folder in (output, other)]
    of = [choose(one, 1000) for one in answered_by_both(data, [output, other], both)]
    assert [one.answered.benchmark.name for one in of] == list(NAMES)
    page = page_of(tmp_path, of)
    a, b = (results["seed"].score.outcomes for results in both)
    better = {
        "A right, B wrong": [x.index for x, y in zip(a, b, strict=True) if x.right > y.right],
        "B right, A wrong": [x.index for x, y in zip(a, b, strict=True) if x.right < y.right],
    }
    assert better["B right, A wrong"] and len(better["A right, B wrong"]) <= 1
    assert Counter(article["data"]["data-state"] for article in page.articles) == +Counter(
        {state: len(indices) for state, indices in better.items()}
    )
    row = next(row for row in page.rows if row[0] == "SEED-Bench image")
    assert row[1:] == [
        *(str(len(of)) for of in better.values()),
        str(60 - len(page.articles)),
        "0",
        str(len(page.articles)),
    ]
    article = page.articles[0]
    assert [name for name, _ in article["rows"]] == ["A answered", "A read as", "B answered", "B read as", "truth"]
    assert all("; right)" in a["rows"][3][1] for a in page.articles if a["data"]["data-state"] == "B right, A wrong")
    assert page.text[0] == f"All {len(page.articles)} answers of which one model's is better."
    assert page.text[1] == "For graded answers, right and wrong mean better and worse than the other model's."
    limited = choose(of[1].answered, 3)
    assert limited.shown == Counter({state: min(3, len(indices)) for state, indices in better.items() if indices})


def test_another_file_or_lost_answers_are_refused(output, other, data, tmp_path):
    both = [read_results(folder) for folder in (output, other)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "SEEDBench_IMG.tsv").write_text(FILES["SEEDBench_IMG"][0].replace("it, 7", "it, 8"))
    with pytest.raises(Refusal, match=r"C-COMPARE\] .*SEEDBench_IMG.tsv:--data: not the file that was asked"):
        list(answered_by_both(tmp_path / "data", [output, other], both))
    lost = evaluated(tmp_path / "out", data, NAMES)
    file = lost / "seed" / "answers-0.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(Refusal, match=r"C-ANSWERS\] .*seed.* a scored answer is missing"):
        chosen(lost, data, names=["seed"])
