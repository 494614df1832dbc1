"""A judge: what it is asked is what VLMEvalKit asks, every reply is kept, no failure loses any, no key leaves."""

import dataclasses
import hashlib
import json
import threading
import time
from collections import defaultdict
from pathlib import Path

import pytest

from llava_moslora.errors import Refusal
from llava_moslora.evaluation.ask import Questions
from llava_moslora.evaluation.benchmarks import BENCHMARKS
from llava_moslora.evaluation.judge import Judge
from llava_moslora.evaluation.judge import judge_answers as judge_and_name
from llava_moslora.evaluation.judge_prompts import judge_prompt
from llava_moslora.evaluation.reading import RULES
from llava_moslora.evaluation.scoring import score
from llava_moslora.evaluation.tsv import Table
from support.chat_server import ChatServer, completion
from support.golden_cases import image, tsv
from support.launching import free_port

GOLDEN = Path(__file__).parent / "golden/vlmevalkit.json"
NOW = RULES["rules"]
KEY = "sk-never-to-be-seen"


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture(scope="module")
def golden():
    return json.loads(GOLDEN.read_text(encoding="utf-8"))["judge"]


def judge_answers(*arguments) -> dict[str, str]:
    return judge_and_name(*arguments)[0]


def questions_of(name, rows, folder) -> Questions:
    """The rows as a file, read again."""
    benchmark = BENCHMARKS[name]
    path = folder / f"{benchmark.file}.tsv"
    path.write_text(tsv(["index", "image", "question", *benchmark.columns, "skills"],
                        [row | {"image": image(k)} for k, row in enumerate(rows)]), encoding="utf-8")  # fmt: skip
    return Questions.of(benchmark, Table(path), prompts="prompts-2024", batch_size=1)


def vets(folder, count=6) -> tuple[Questions, dict[str, str]]:
    rows = [{"index": f"v{k}", "question": f"What is x, {k}?", "answer": "5", "category": "math"} for k in range(count)]
    return questions_of("mmvet", rows, folder), {row["index"]: f"x = {k}" for k, row in enumerate(rows)}


def judge_at(server, model="gpt-4", *, waits=(0.0, 0.0), timeout=10.0) -> Judge:
    return dataclasses.replace(Judge.of(getattr(server, "url", server), model), waits=waits, timeout=timeout)


def kept(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "judge.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("kind", ["mathvista", "mmvet"])
def test_requests_and_scores_are_the_kits(golden, tmp_path, kind):
    """The same texts at the same temperatures in the same order, and from the same replies the same table."""
    cases = golden[kind]["cases"]
    rows, answers = [case[0] for case in cases], {case[0]["index"]: case[1] for case in cases}
    by_prompt = {case[3]: (case[0]["index"], list(case[2])) for case in cases if case[3]}
    asked = defaultdict(list)

    def reply(body):
        assert body.keys() == {"model", "messages", "max_tokens", "temperature"}
        assert body["max_tokens"] == {"mathvista": 128, "mmvet": 3}[kind] and body["model"] == "gpt-4-1106-preview"
        (message,) = body["messages"]
        assert message.keys() == {"role", "content"} and message["role"] == "user"
        index, replies = by_prompt[hashlib.sha256(message["content"].encode()).hexdigest()]
        asked[index].append(body["temperature"])
        return f" {replies.pop(0) if len(replies) > 1 else replies[0]}\n"

    with ChatServer(reply) as server:
        questions = questions_of(kind, rows, tmp_path)
        judged = judge_answers(judge_at(server, "gpt-4-1106-preview"), questions, answers, NOW, tmp_path)
        assert {path for path, _, _ in server.requests} == {"/v1/chat/completions"}
    assert {case[0]["index"]: case[4] for case in cases} == {row["index"]: asked[row["index"]] for row in rows}
    result = score(kind, questions.rows, answers, NOW, judged)
    by = result.by["capability"] if kind == "mmvet" else result.by["task"] | result.by["skill"]
    table = {line.get("Task&Skill") or line["Category"]: line["acc"] for line in golden[kind]["table"]}
    assert by | {"Overall": result.value} == pytest.approx(table, abs=1e-9)
    assert result.read_by["judge"] > 10 and result.note == ""


def test_prompts_are_the_kits_letter_by_letter(golden):
    seen = []
    for kind, part in golden.items():
        rows = {case[0]["index"]: case for case in part["cases"]}
        for index, text in part["prompts"].items():
            row, answer, *_ = rows[index]
            assert judge_prompt(row, kind, answer) == text
            seen.append(row.get("answer_type", kind))
    assert seen == ["text", "integer", "list", "mmvet", "mmvet", "mmvet"]


def test_a_second_run_asks_nothing(tmp_path):
    questions, answers = vets(tmp_path)
    with ChatServer(lambda body: "0.5" if body["temperature"] else "good") as server:
        first = judge_answers(judge_at(server), questions, answers, NOW, tmp_path)
        assert len(server.requests) == 12
    closed = judge_at(server)
    assert judge_answers(closed, questions, answers, NOW, tmp_path) == first == dict.fromkeys(answers, "0.5")
    header, *lines = kept(tmp_path)
    assert header["header"]["benchmark"] == "mmvet" and "ms-vlmeval 0.0.20" in header["header"]["judge_prompts"]
    assert len(lines) == 12 and {line["judge"] for line in lines} == {"gpt-4"}
    with pytest.raises(Refusal, match="E-JUDGE"):  # another answer is another question
        judge_answers(closed, questions, answers | {"v0": "other"}, NOW, tmp_path)


@pytest.mark.parametrize("lost, expected", [(1, 1), (20, 1), (10**6, 6)])
def test_after_a_kill_only_what_is_open_is_asked(tmp_path, lost, expected):
    """A last line without its end does not count, and is not glued to the next."""
    questions, answers = vets(tmp_path)
    with ChatServer(lambda body: "0.5") as server:
        first = judge_answers(judge_at(server), questions, answers, NOW, tmp_path)
        file = tmp_path / "judge.jsonl"
        whole = file.read_bytes()
        file.write_bytes(whole[: max(4, len(whole) - lost)])
        server.requests.clear()
        assert judge_answers(judge_at(server), questions, answers, NOW, tmp_path) == first
        assert len(server.requests) == expected and len(kept(tmp_path)) == 7


def test_two_judges_never_mix(tmp_path):
    questions, answers = vets(tmp_path)
    with ChatServer(lambda body: {"gpt-4": "0.5", "other": "0.9"}[body["model"]]) as server:
        for model, grade in (("gpt-4", "0.5"), ("other", "0.9"), ("gpt-4", "0.5")):
            judged = judge_answers(judge_at(server, model), questions, answers, NOW, tmp_path)
            assert judged == dict.fromkeys(answers, grade)
        assert len(server.requests) == 12
    assert [line["judge"] for line in kept(tmp_path)[1:]] == ["gpt-4"] * 6 + ["other"] * 6


def test_the_result_names_the_host_that_replied(tmp_path):
    """Not the one of the last command line, which was asked nothing."""
    questions, answers = vets(tmp_path)
    with ChatServer(lambda body: "1.0") as server:
        first = judge_and_name(judge_at(server), questions, answers, NOW, tmp_path)[1]
        assert first["judge"] == "gpt-4" and first["judge_host"] == server.url.removeprefix("http://")
        assert judge_and_name(judge_at("http://elsewhere"), questions, answers, NOW, tmp_path)[1] == first
        with ChatServer(lambda body: "1.0") as other:
            mixed = judge_and_name(judge_at(other), questions, answers | {"v0": "x"}, NOW, tmp_path)[1]
    hosts = sorted(url.removeprefix("http://") for url in (server.url, other.url))
    assert mixed["judge_host"] == " and ".join(hosts) and len(other.requests) == 1


def test_only_what_the_rules_cannot_read_is_judged(tmp_path):
    row = {"question": "?", "answer": "3", "question_type": "free_form", "answer_type": "integer", "task": "t"}
    questions = questions_of("mathvista", [row | {"index": str(k)} for k in range(3)], tmp_path)
    answers = {"0": "3", "1": "It is 3", "2": "I do not know"}
    with ChatServer(lambda body: "3" if "It is 3" in body["messages"][0]["content"] else "none") as server:
        judged = judge_answers(judge_at(server), questions, answers, NOW, tmp_path)
    assert judged == {"1": "3", "2": "none"} and [body["temperature"] for body in server.bodies] == [0.0, 0.0]
    assert score("mathvista", questions.rows, answers, NOW, judged).value == pytest.approx(200 / 3)


def test_a_grade_cut_off_at_its_point_is_asked_for_again(tmp_path):
    questions, answers = vets(tmp_path, 1)
    with ChatServer(lambda body: "0.7"[: body["max_tokens"] - 1]) as server:  # a tokenizer that starts with a space
        assert judge_answers(judge_at(server), questions, answers, NOW, tmp_path) == {"v0": "0.7"}
    assert [(body["max_tokens"], body["temperature"]) for body in server.bodies] == [(3, 0.0), (4, 0.0)]


def test_a_reply_that_is_no_grade_counts_as_unread(tmp_path):
    questions, answers = vets(tmp_path, 2)
    replies = {"x = 0": "good", "x = 1": "1.0"}

    def reply(body):
        return next(text for answer, text in replies.items() if f"| {answer} |" in body["messages"][0]["content"])

    with ChatServer(reply) as server:
        judged = judge_answers(judge_at(server), questions, answers, NOW, tmp_path)
    assert judged == {"v0": "good", "v1": "1.0"} and len(server.requests) == 6
    result = score("mmvet", questions.rows, answers, NOW, judged)
    assert result.value == 50 and result.unread == 0.5


BUSY = (429, "slow down", {"Retry-After": "0"})


@pytest.mark.parametrize("failures", [[BUSY], [BUSY, (503, "loading", {})], [None, (500, "", {})], [(408, "", {})]])
def test_a_server_that_is_busy_or_down_for_a_moment_is_asked_again(tmp_path, failures):
    questions, answers = vets(tmp_path, 1)
    script = list(failures)

    def reply(body):
        made = script.pop(0) if script else "1.0"
        if made is None:
            raise ConnectionError
        return made

    with ChatServer(reply) as server:
        assert judge_answers(judge_at(server), questions, answers, NOW, tmp_path) == {"v0": "1.0"}
    assert len(server.requests) == len(failures) + 1 and len({body for _, _, body in server.requests}) == 1


def test_it_waits_as_long_as_the_server_wants(tmp_path):
    questions, answers = vets(tmp_path, 1)
    script = [(429, "", {"Retry-After": "1"})]
    with ChatServer(lambda body: script.pop() if script else "1.0") as server:
        begun = time.monotonic()
        judge_answers(judge_at(server), questions, answers, NOW, tmp_path)
    assert time.monotonic() - begun >= 1.0


@pytest.mark.parametrize("made, tries, match", [
    ((500, "out of\nmemory", {}), 3, r"the judge cannot be asked; found status 500: out of\\nmemory; fix: see that "),
    (BUSY, 3, "found status 429: slow down; fix: wait"),
    ((401, '{"error": "no key"}', {}), 1, "found status 401: .*no key.*; fix: set OPENAI_API_KEY to a key of this"),
    ((404, "no such model", {}), 1, "status 404: no such model; fix: check the URL and the model's name"),
    ((400, "x" * 5000, {}), 1, f"status 400: {'x' * 188}; fix: see what"),
    ((307, "", {"Location": "http://127.0.0.1:1/v1"}), 1, "status 307: ;"),
    ((200, "<html>", {}), 1, "not the reply of a chat model; found <html>; fix: check the URL"),
    ((200, "", {}), 1, "not the reply of a chat model; found nothing;"),
    ((200, '{"choices": []}', {}), 1, r'found \{"choices": \[\]\};'),
    ((200, '{"error": {"message": "no"}}', {}), 1, "not the reply of a chat model"),
    ((200, '{"choices": [{"message": {"content": 5}}]}', {}), 1, "not the reply of a chat model"),
    ((200, "[" * 100_000, {}), 1, "not the reply of a chat model"),
    (completion(None), 5, "no answer in any reply to question v0; found nothing; fix: use a non-reasoning judge"),
    (completion(" \n"), 5, "no answer in any reply"), (completion("<think>\nSo"), 5, "no answer in any reply"),
])  # fmt: skip
def test_a_judge_that_fails_is_one_line(tmp_path, made, tries, match):
    questions, answers = vets(tmp_path, 1)
    with ChatServer(lambda body: made) as server:
        with pytest.raises(Refusal, match=match) as caught:
            judge_answers(judge_at(server), questions, answers, NOW, tmp_path)
        assert len(server.requests) == tries
    line = caught.value.line()
    assert line.startswith(f"error[E-JUDGE] {server.url}/v1/chat/completions:--judge: ") and "\n" not in line
    assert caught.value.exit_status == 4 and line.endswith("the same command asks only what is open")
    assert len(kept(tmp_path)) == 1  # the header


def test_nobody_listens(tmp_path):
    questions, answers = vets(tmp_path)
    with pytest.raises(Refusal, match=r"E-JUDGE\] .*: the judge cannot be asked; found .*refused"):
        judge_answers(judge_at(f"http://127.0.0.1:{free_port()}"), questions, answers, NOW, tmp_path)


def test_a_server_that_hangs(tmp_path):
    questions, answers = vets(tmp_path, 1)
    release = threading.Event()
    with ChatServer(lambda body: release.wait(20) and None) as server:
        with pytest.raises(Refusal, match=r"E-JUDGE\] .*found .*timed out"):
            judge_answers(judge_at(server, timeout=0.2), questions, answers, NOW, tmp_path)
        assert len(server.requests) == 3
        release.set()


def test_a_failure_costs_no_reply_and_ends_the_others(tmp_path):
    """What came before it is kept; the rows that wait are not asked; a request on its way is kept too."""
    questions, answers = vets(tmp_path, 40)
    lock, count = threading.Lock(), 0

    def reply(body):
        nonlocal count
        with lock:
            count += 1
            turn = count
        if turn > 11:
            time.sleep(0.2)  # the others are on their way
            return (500, "broken", {}) if turn == 12 else "0.1"
        return "0.1"

    with ChatServer(reply) as server:
        with pytest.raises(Refusal, match="status 500: broken"):
            judge_answers(judge_at(server, waits=()), questions, answers, NOW, tmp_path)
        assert 12 <= len(server.requests) < 25
        done = {line["index"] for line in kept(tmp_path)[1:]}
        assert len(done) == len(server.requests) - 1
        server.requests.clear()
        assert judge_answers(judge_at(server), questions, answers, NOW, tmp_path) == dict.fromkeys(answers, "0.1")
        assert len(server.requests) == 40 - len(done)


def test_a_retry_ends_when_another_request_failed(tmp_path):
    """One refusal does not wait for the back-off of the others."""
    questions, answers = vets(tmp_path, 2)

    def reply(body):
        if "x = 0" in body["messages"][0]["content"]:
            return 500, "", {}
        time.sleep(0.3)
        return 401, "", {}

    with ChatServer(reply) as server, pytest.raises(Refusal, match="status 401"):
        begun = time.monotonic()
        judge_answers(judge_at(server, waits=(60.0,)), questions, answers, NOW, tmp_path)
    assert time.monotonic() - begun < 30


@pytest.mark.parametrize("status", [200, 401, 302])
def test_the_key_goes_to_the_server_and_nowhere_else(tmp_path, monkeypatch, status, capfd):
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n")
    questions, answers = vets(tmp_path, 2)
    said = json.dumps({"error": f"Incorrect key: {KEY}"})
    with ChatServer(lambda body: "1.0") as other:
        headers = {"Location": f"{other.url}/v1/chat/completions"}
        with ChatServer(lambda body: "1.0" if status == 200 else (status, said, headers)) as server:
            judge = judge_at(server)
            assert KEY not in repr(judge)
            if status == 200:
                judge_answers(judge, questions, answers, NOW, tmp_path)
            else:
                with pytest.raises(Refusal, match="Incorrect key: …") as caught:
                    judge_answers(judge, questions, answers, NOW, tmp_path)
                assert KEY not in caught.value.line() and KEY not in repr(caught.value.__dict__)
            assert {headers["Authorization"] for _, headers, _ in server.requests} == {f"Bearer {KEY}"}
            assert not any(KEY.encode() in body for _, _, body in server.requests)
        assert other.requests == []
    assert not any(KEY.encode() in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert KEY not in "".join(capfd.readouterr())


@pytest.mark.parametrize("key", [f"{KEY}\nX: y", f"{KEY} {KEY}", f"{KEY}é"])
def test_a_key_that_cannot_be_sent(monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(Refusal, match=r"C-KEY\] OPENAI_API_KEY: not a key: it has a space") as caught:
        Judge.of("http://h", "m")
    assert KEY not in caught.value.line()


def test_without_a_key_no_header_is_sent(tmp_path):
    questions, answers = vets(tmp_path, 1)
    with ChatServer(lambda body: "1.0") as server:
        judge_answers(judge_at(server), questions, answers, NOW, tmp_path)
    assert "Authorization" not in server.requests[0][1]


@pytest.mark.parametrize("url, expected", [
    ("http://h:8000", "http://h:8000/v1/chat/completions"), ("http://h:8000/", "http://h:8000/v1/chat/completions"),
    ("http://h/v1", "http://h/v1/chat/completions"), ("https://h/v1/", "https://h/v1/chat/completions"),
    ("https://h/v1/chat/completions", "https://h/v1/chat/completions"),
    ("https://h/api", "https://h/api/v1/chat/completions"), ("http://[::1]:80", "http://[::1]:80/v1/chat/completions"),
    ("https://h/v1beta/openai/", "https://h/v1beta/openai/chat/completions"),
])  # fmt: skip
def test_urls(url, expected):
    judge = Judge.of(url, "m")
    assert judge.url == expected and judge.host == expected.split("/")[2]


@pytest.mark.parametrize("url", [
    "h:8000", "ftp://h", "http://", "http://:80", "http://h:x", "http://h:0", "http://h:99999", "http://[::1",
    "http://h/a b", "http://é", "", "http://a..b", "http:///v1", "file:///etc/passwd",
])  # fmt: skip
def test_what_is_no_url_is_refused(url):
    with pytest.raises(
        Refusal, match=r"C-FLAG\] --judge: not the URL of a server; found .*; expected http://HOST:PORT/v1"
    ):
        Judge.of(url, "m")


@pytest.mark.parametrize("url", [f"http://u:{KEY}@h", f"https://h/v1?key={KEY}", f"http://h/#{KEY}"])
def test_a_password_in_the_url_is_refused_and_not_repeated(url):
    with pytest.raises(Refusal, match=r"C-FLAG\] --judge: the URL may only have .* environment, as OPENAI") as caught:
        Judge.of(url, "m")
    assert KEY not in caught.value.line()


@pytest.mark.parametrize("model", ["", " ", "a\nb", "\udcff"])
def test_a_model_without_a_name(model):
    with pytest.raises(Refusal, match=r"C-FLAG\] --judge: no model name"):
        Judge.of("http://h", model)


def test_a_damaged_line_is_refused(tmp_path):
    questions, answers = vets(tmp_path)
    with ChatServer(lambda body: "0.5") as server:
        judge_answers(judge_at(server), questions, answers, NOW, tmp_path)
        file = tmp_path / "judge.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        file.write_text("".join([lines[0], "x\n", *lines[1:]]), encoding="utf-8")
        with pytest.raises(Refusal, match=r"C-ANSWERS\] .*judge.jsonl:record 1: a damaged line; found x; fix: delete"):
            judge_answers(judge_at(server), questions, answers, NOW, tmp_path)


@pytest.mark.parametrize("text", ["0.5 \ud800", "1.0\n…é"])
def test_replies_of_any_text(tmp_path, text):
    questions, answers = vets(tmp_path, 1)
    with ChatServer(lambda body: completion(text)) as server:
        first = judge_answers(judge_at(server), questions, answers, NOW, tmp_path)
        count = len(server.requests)
        assert judge_answers(judge_at(server), questions, answers, NOW, tmp_path) == first
        assert len(server.requests) == count
