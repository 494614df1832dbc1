import multiprocessing
import pickle
import subprocess
import sys

import pytest

from llava_moslora.errors import EXIT_STATUS, Refusal, printable


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
def test_script_ends_with_the_status_and_one_line(letter):
    program = (
        "from llava_moslora.errors import Refusal, run_script\n"
        f"def main(): raise Refusal('{letter}-X', 'broken', fix='mend it')\n"
        "run_script(main)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == EXIT_STATUS[letter]
    assert done.stderr.splitlines()[-1] == f"error[{letter}-X] broken; fix: mend it"
    assert "Traceback" not in done.stderr and done.stdout == ""


def _refuse(_):
    raise Refusal("D-X", "in a worker", record=5)


def test_arrives_from_a_worker():
    with multiprocessing.get_context("fork").Pool(1) as pool, pytest.raises(Refusal, match="record 5"):
        pool.map(_refuse, [0])
