import multiprocessing
import pickle

import pytest

from llava_moslora.errors import EXIT_STATUS, Refusal, printable, run_script


def test_line_names_place_found_expected_and_fix():
    refusal = Refusal(
        "D-ROLE", "two humans in a row", file="a.json", record=3, record_id="x", key="conversations", found="human",
        expected="gpt", fix="answer the first",
    )  # fmt: skip
    assert refusal.line() == (
        "error[D-ROLE] a.json:record 3 id=x:conversations: two humans in a row; found human; expected gpt;"
        " fix: answer the first"
    )
    assert str(refusal) == refusal.line()
    assert refusal.exit_status == 2


def test_line_stays_one_printable_line():
    line = Refusal("D-PATH", "no such file", file="a\nb\x1b[31m\u202e.png", found="x" * 5000).line()
    assert "\n" not in line and "\x1b" not in line and "\u202e" not in line
    assert len(line) < 500


def test_lone_surrogate_can_be_printed():
    printable("\ud83d").encode()


def test_survives_a_process_boundary():
    refusal = Refusal("I-MISSING", "no such picture", file="a.png", record=7, fix="look")
    again = pickle.loads(pickle.dumps(refusal))
    assert again.line() == refusal.line() and again.record == 7 and again.code == "I-MISSING"


@pytest.mark.parametrize("letter", sorted(EXIT_STATUS))
def test_script_ends_with_the_status_and_one_line(letter, capsys):
    def main():
        raise Refusal(f"{letter}-X", "broken", fix="mend it")

    with pytest.raises(SystemExit) as ended:
        run_script(main)
    assert ended.value.code == EXIT_STATUS[letter]
    printed = capsys.readouterr()
    assert printed.err == f"error[{letter}-X] broken; fix: mend it\n" and printed.out == ""


def test_traceback_on_demand(monkeypatch, capsys):
    monkeypatch.setenv("LLAVA_MOSLORA_DEBUG", "1")
    with pytest.raises(SystemExit):
        run_script(lambda: _refuse(None))
    assert "Traceback" in capsys.readouterr().err


def _refuse(_):
    raise Refusal("D-X", "in a worker", record=5)


def test_arrives_from_a_worker():
    with multiprocessing.get_context("fork").Pool(1) as pool, pytest.raises(Refusal, match="record 5"):
        pool.map(_refuse, [0])
