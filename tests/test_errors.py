import configparser
import errno
import multiprocessing
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import distributed
from tqdm import tqdm

from llava_moslora.errors import EXIT_STATUS, Refusal, failure_in, printable, run_script
from llava_moslora.planning.report import CANNOT_SAY, DOES_NOT_FIT, FITS
from support.launching import ROOT


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


def test_what_is_wrong_and_the_remedy_may_repeat_what_was_given():
    line = Refusal("C-FLAG", "invalid value: " + "a\u202e" * 5000, fix="did you mean \x1b[31m").line()
    assert line.isprintable() and len(line) < 2500


def test_lone_surrogate_can_be_printed():
    printable("\ud83d").encode()


TABLES = ("README.md", *(f"docs/{file.name}" for file in sorted((ROOT / "docs").glob("*.md"))))


def statuses(page: str) -> list[dict[int, str]]:
    """Of every table of a page whose first column is of exit statuses: status → the row's other cells."""
    tables = re.findall(r"^\| (?:exit )?status \|.*\n\|[ |-]+\n((?:\|.*\n)+)", (ROOT / page).read_text(), re.MULTILINE)
    rows = [[row.strip("| \n").split("|", 1) for row in table.splitlines()] for table in tables]
    return [{int(number): cells for first, cells in table for number in first.split(",")[:1]} for table in rows]


def test_the_pages_tables_of_exit_statuses_are_the_codes():
    """All of them where a page lists all, with the letter where there is a column of letters; 0 is success."""
    found = {page: tables for page in TABLES if (tables := statuses(page))}
    assert list(found) == ["docs/design.md", "docs/planning.md", "docs/training.md"]
    ((design,), (planning,), (training,)) = found.values()
    everywhere = {0, *EXIT_STATUS.values()}
    assert set(design) == set(training) == everywhere
    assert set(planning) == {FITS, DOES_NOT_FIT, CANNOT_SAY} <= everywhere
    letters = {status: set(re.findall(r"`([A-Z])-`", cells.split("|")[0])) for status, cells in design.items()}
    assert letters == {status: {key for key, value in EXIT_STATUS.items() if value == status} for status in everywhere}
    restarted = {status for status, cells in training.items() if cells.split("|")[-1].strip().startswith("yes")}
    assert restarted == {EXIT_STATUS["P"]}


def test_a_checkout_is_installed_by_one_form_of_line():
    """On every page ``pip install -e '.[EXTRA]'``, with an extra that there is."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = set(setup["options.extras_require"])
    for page in (*TABLES, "CONTRIBUTING.md"):
        for words in re.findall(r"pip install ([^`\n]*)", (ROOT / page).read_text()):
            if re.search(r"(^|[ '\"])\.(\[|$|[ '\"])", words):
                match = re.match(r"-e '\.\[([\w,]+)\]'", words)
                assert match and set(match[1].split(",")) <= extras, f"{page}: pip install {words}"


def test_survives_a_process_boundary():
    refusal = Refusal("I-MISSING", "no such image", file="a.png", record=7, fix="look")
    again = pickle.loads(pickle.dumps(refusal))
    assert again.line() == refusal.line() and again.record == 7 and again.code == "I-MISSING"


@pytest.mark.parametrize("letter", sorted(EXIT_STATUS))
def test_script_ends_with_the_status_and_one_line(letter, capsys):
    def main():
        raise Refusal(f"{letter}-X", "broken", fix="repair it")

    with pytest.raises(SystemExit) as ended:
        run_script(main)
    assert ended.value.code == EXIT_STATUS[letter]
    printed = capsys.readouterr()
    assert printed.err == f"error[{letter}-X] broken; fix: repair it\n" and printed.out == ""


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


def ended(error: BaseException, capsys) -> tuple[int, str]:
    """The status and the line of a script whose ``main`` raises ``error``."""

    def main():
        raise error

    with pytest.raises(SystemExit) as leaving:
        run_script(main)
    printed = capsys.readouterr()
    assert "\n" not in printed.err.strip() and "Traceback" not in printed.err  # below an empty line on other ranks
    return leaving.value.code, printed.err


def system(number: int, file: str | None = None) -> OSError:
    return OSError(number, os.strerror(number), file)


FAILURES = {
    "E-DISK": (4, system(errno.ENOSPC, "/data/x"), "/data/x: the disk is full"),
    "E-DISK of Rust": (4, SafetensorError("I/O error: No space left on device (os error 28)"), "the disk is full"),
    "E-DISK of tokenizers": (4, Exception("No space left on device (os error 28)"), "the disk is full"),
    "E-PERMISSION": (4, system(errno.EACCES, "a"), "a: not permitted; found PermissionError"),
    "E-PERMISSION read-only": (4, system(errno.EROFS, "a"), "a: not permitted"),
    "E-FILES": (4, system(errno.EMFILE), "ulimit -n"),
    "E-MEMORY": (4, MemoryError(), "not enough memory on this machine"),
    "E-MEMORY of the device": (4, torch.OutOfMemoryError("CUDA out of memory. Tried"), "found OutOfMemoryError"),
    "E-MEMORY of the allocator": (
        4, RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"), "not enough"
    ),
    "E-WORKER": (4, RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "reads images died"),
    "E-WORKER shm": (4, RuntimeError("unable to write to file </torch_1_2>: No space left on device (28)"), "/dev/shm"),
    "E-PORT": (4, distributed.DistNetworkError("the server socket has failed: address already in use"), "another port"),
    "E-NCCL": (
        4, distributed.DistBackendError("NCCL error in: x.cpp:1, invalid usage, NCCL version 2.2"), "NCCL_DEBUG=WARN"
    ),
    "E-DEVICE": (4, RuntimeError("CUDA error: no kernel image is available for execution"), "the device cannot"),
    "P-STOPPED": (75, KeyboardInterrupt(), "stopped by Ctrl-C"),
    "P-CONNECTION": (75, ConnectionResetError(104, "Connection reset by peer"), "a connection to another process"),
    "P-RANK": (75, distributed.DistBackendError("NCCL communicator was aborted on rank 1."), "lost contact"),
    "P-RANK of the store": (75, distributed.DistStoreError("Timed out after 1801 s waiting for clients."), "lost"),
    "P-RANK of a new group": (
        75,
        RuntimeError("Gloo connectFullMesh failed with [pair.cc:152] timed out connecting: SO_ERROR: ..."),
        "lost contact",
    ),
    "P-RANK of gloo": (75, RuntimeError("[pair.cc:547] Connection closed by peer [10.0.0.1]:41234"), "lost contact"),
    "P-DEVICE": (75, RuntimeError("CUDA error: uncorrectable ECC error encountered"), "the device failed"),
}  # fmt: skip


@pytest.mark.parametrize("case", FAILURES)
def test_known_failures_have_a_status_of_their_own(case, capsys):
    status, error, words = FAILURES[case]
    found, line = ended(error, capsys)
    assert (found, line.startswith(f"error[{case.split()[0]}] ")) == (status, True) and words in line, line


def test_the_cause_of_a_librarys_error_counts(capsys):
    wrapped = RuntimeError("Caught OSError in something")
    wrapped.__cause__ = system(errno.ENOSPC, "x")
    assert ended(wrapped, capsys)[0] == 4
    wrapped.__cause__ = Refusal("D-ROLE", "two humans in a row")
    assert ended(wrapped, capsys) == (2, "error[D-ROLE] two humans in a row\n")


DEFECTS = [
    KeyError("exp_avg"),
    AssertionError("64 placeholders for 32 features"),
    FileNotFoundError(errno.ENOENT, "No such file or directory", "x"),
    RuntimeError("shape mismatch"),
    RuntimeError("CUDA error: device-side assert triggered"),
]


@pytest.mark.parametrize("error", DEFECTS, ids=repr)
def test_everything_else_is_a_defect_with_a_report(error, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "--lora_r", "8"])
    status, line = ended(error, capsys)
    (file,) = tmp_path.iterdir()
    assert status == 70 and line.startswith("error[X-DEFECT] a bug in this package; found ") and str(file) in line
    report = file.read_text()
    for part in ("train.py --lora_r 8", "Traceback (most recent call last)", "raise error", type(error).__name__,
                 f"torch {torch.__version__.split('+')[0]}", "python 3."):  # fmt: skip
        assert part in report, part


@pytest.mark.parametrize("form", [["--output_dir", "run"], ["--output_dir=run"]])
def test_the_report_lies_in_the_output_folder_and_leaves_it_empty(form, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *form])
    (tmp_path / "run").mkdir()
    line = ended(KeyError("x"), capsys)[1]
    (file,) = (tmp_path / "run").iterdir()
    assert str(file) in line and file.name.startswith(".")
    assert list(tmp_path.iterdir()) == [tmp_path / "run"]


def test_a_report_that_cannot_be_saved(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(system(errno.ENOSPC)))
    status, line = ended(KeyError("x"), capsys)
    assert status == 70 and "LLAVA_MOSLORA_DEBUG=1 shows the traceback" in line


@pytest.mark.parametrize("rank", ["", "zero"])
def test_a_rank_that_is_no_number(rank, capsys, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    assert ended(Refusal("D-ROLE", "two humans in a row"), capsys)[0] == 2


def script(body: str, unbuffered: str = "", **options) -> subprocess.Popen:
    code = f"from llava_moslora.errors import Refusal, run_script\ndef main():\n    {body}\nrun_script(main)\n"
    buffered = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=buffered, **options)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_is_gone(unbuffered):
    """``python scripts/… | head -1``"""
    running = script("for k in range(10**6): print(k)", unbuffered, stdout=subprocess.PIPE)
    running.stdout.readline()
    running.stdout.close()
    assert running.stderr.readlines()[-1] == (
        "error[E-OUTPUT] the reader of the output was closed; found BrokenPipeError: [Errno 32] Broken pipe;"
        " fix: redirect it to a file\n"
    )
    assert running.wait(60) == 4


@pytest.mark.parametrize("body", ["print('x')", "print('x', flush=True)", "print('x'); raise KeyError('x')"])
def test_a_full_disk_behind_the_output(body, tmp_path):
    with Path("/dev/full").open("w") as full:
        running = script(body, stdout=full, cwd=tmp_path)
        said = running.stderr.read()
    code, status = ("X-DEFECT", 70) if "raise" in body else ("E-DISK", 4)
    assert said.splitlines()[-1].startswith(f"error[{code}] ") and "Traceback" not in said
    assert running.wait(60) == status


def test_an_output_that_was_never_open(tmp_path):
    """``python scripts/… >&-``"""
    body = "print('x'); sys.stdout is None or print('not None', file=sys.stderr)".replace("sys.", "__import__('sys').")
    running = script(body, cwd=tmp_path, preexec_fn=lambda: os.close(1))
    assert running.stderr.read() == "" and running.wait(60) == 0


@pytest.mark.parametrize("how", [{}, {"leave": False}, {"position": 1}], ids=["left", "cleared", "below another"])
def test_the_line_begins_a_line_below_a_progress_bar(capsys, how):
    """A line as ``grep '^error'`` sees it: it begins after a newline, not where a bar moved the cursor to."""
    bars = [tqdm(total=3), tqdm(total=3, **how)]
    for bar in bars:
        bar.update()

    def main():
        raise Refusal("D-ROLE", "two humans in a row")

    with pytest.raises(SystemExit):
        run_script(main)
    assert capsys.readouterr().err.split("\n")[-2:] == ["error[D-ROLE] two humans in a row", ""]


def test_a_full_disk_that_names_no_file(capsys, monkeypatch):
    """The line names what the command writes."""
    monkeypatch.setattr(sys, "argv", ["export.py", "run", "--output_dir=merged", "--format", "hf"])
    assert "error[E-DISK] merged: the disk is full" in ended(system(errno.ENOSPC), capsys)[1]
    rust = SafetensorError("I/O error: No space left on device (os error 28)")
    assert "error[E-DISK] merged: the disk is full" in ended(rust, capsys)[1]
    renamed = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "from", None, "to")
    assert "error[E-DISK] to: the disk is full" in ended(renamed, capsys)[1]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("Traceback …\nOSError: [Errno 28] No space left on device", "E-DISK"),
        ("Traceback …\nOSError: [Errno 122] Disk quota exceeded: 'x'", "E-DISK"),
        ("Traceback …\nSafetensorError: I/O error: Read-only file system (os error 30)", "E-PERMISSION"),
        ("Traceback …\nKeyError: 'lora_A'", None),
        ("Traceback …\nFileNotFoundError: [Errno 2] No such file", None),
    ],
)
def test_what_another_process_printed(text, code):
    refusal = failure_in(text, "out")
    assert (refusal and refusal.code) == code
    if refusal is not None:
        assert refusal.line().startswith(f"error[{code}] out: ") and text.splitlines()[1] in refusal.line()


def test_a_lost_rank_0_lets_the_cause_end_first(capsys, monkeypatch):
    """The launcher reports the status of the process that ends first: it is to be that of the rank with the defect."""
    naps = []
    monkeypatch.setattr("llava_moslora.errors.time.sleep", naps.append)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, refusal, expected in (
        ("0", Refusal("P-RANK", "lost"), [5]),
        ("1", Refusal("P-RANK", "lost"), [5]),
        ("0", Refusal("D-ROLE", "two humans"), []),
        ("1", Refusal("D-ROLE", "two humans"), [5]),
    ):
        monkeypatch.setenv("RANK", rank)
        ended(refusal, capsys)
        assert naps == expected
        naps.clear()


ONE_RANK_FAILS = """
import os
import torch
from torch import distributed
from tqdm import tqdm
from llava_moslora.errors import run_script
from llava_moslora.training.callbacks.preemption import catch_lost_ranks

def main():
    distributed.init_process_group("gloo")
    if os.environ["RANK"] == "WHICH":
        raise KeyError("exp_avg")
    with catch_lost_ranks():
        distributed.all_reduce(torch.ones(1))

run_script(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_defect_on_one_rank_is_the_status_of_all(rank, tmp_path):
    """The other rank only loses contact, which is a status to start again on; the launcher must not report that one."""
    from support.launching import LAUNCHER, free_port

    (tmp_path / "train.py").write_text(ONE_RANK_FAILS.replace("WHICH", rank))
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    command = [*LAUNCHER, "--master_port", str(free_port()), "train.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=200)
    assert done.returncode == 70, done.stdout[-2000:] + done.stderr[-2000:]
    assert "error[X-DEFECT]" in done.stderr and "Traceback" not in done.stdout + done.stderr
    (report,) = tmp_path.glob(".defect-*")
    assert f"rank {rank} of 2" in report.read_text() and "KeyError: 'exp_avg'" in report.read_text()


STOP = """
import os, signal, sys, time
from llava_moslora.errors import run_script

signal.signal(signal.SIGINT, signal.default_int_handler)  # a command in the background of a shell ignores it
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and one below nohup this

def stop():
    os.kill(os.getpid(), signal.{name})
    time.sleep(20)

class Late:
    def __del__(self):
        os.kill(os.getpid(), signal.{name})
        time.sleep(20)

def late():
    Late()
    time.sleep(20)

run_script({in_main})
stop()  # while the modules of a script are imported
"""


@pytest.mark.parametrize("in_main", ["stop", "late", "lambda: None"])
@pytest.mark.parametrize(("name", "said"), [("SIGINT", "Ctrl-C"), ("SIGTERM", "SIGTERM"), ("SIGHUP", "SIGHUP")])
def test_a_signal_ends_a_script_with_one_line(name, said, in_main):
    command = [sys.executable, "-c", STOP.format(name=name, in_main=in_main)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    line = f"error[P-STOPPED] stopped by {said}; fix: start the same command again\n"
    assert (done.returncode, done.stdout, done.stderr) == (75, "", line)


LOST = """
def lose():
    try:
        os.kill(os.getpid(), signal.{name})
        time.sleep(20)
    except BaseException:
        pass

run_script(lambda: None)
{first}
run_script({in_main})
print("went on")
"""


@pytest.mark.parametrize(
    ("first", "in_main"),
    [
        ("lose()", "lambda: print('main')"),
        ("lose(); import not_there", "lambda: None"),
        ("", "lambda: lose() or 1 / 0"),
    ],
    ids=["and nothing else", "and an import fails", "in main"],
)
@pytest.mark.parametrize(("name", "said"), [("SIGINT", "Ctrl-C"), ("SIGTERM", "SIGTERM"), ("SIGHUP", "SIGHUP")])
def test_a_signal_that_a_library_loses(name, said, first, in_main, tmp_path):
    """As torch does, which imports NumPy in C++. After Ctrl-C a script's main may go on: a chat does."""
    begin = STOP.split("def stop()")[0]
    program = begin + LOST.format(name=name, first=first, in_main=in_main)
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)  # for its report
    if not first and name == "SIGINT":
        assert done.returncode == 70 and "ZeroDivisionError" in done.stderr
        return
    line = f"error[P-STOPPED] stopped by {said}; fix: start the same command again\n"
    assert (done.returncode, done.stdout, done.stderr) == (75, "", line)


def test_a_hangup_that_is_ignored_stays_ignored():
    """As under nohup."""
    script = "import os, signal; from llava_moslora.errors import run_script; signal.signal(1, signal.SIG_IGN)"
    script += "; run_script(lambda: os.kill(os.getpid(), signal.SIGHUP)); print('went on')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "went on\n", "")


def test_closed_streams_are_not_taken_by_the_next_file(tmp_path):
    """A file opened first would be standard output's number, and what C libraries print would go into it."""
    script = "import os; from llava_moslora.errors import run_script; run_script(lambda: print(end=''))"
    script += f"; os.write(1, b'noise'); assert open({str(tmp_path / 'x')!r}, 'w').fileno() > 2"
    command = f'{sys.executable} -c "$SCRIPT" <&- >&- 2>&-'
    done = subprocess.run(["bash", "-c", command], env=os.environ | {"SCRIPT": script}, timeout=60)
    assert done.returncode == 0 and (tmp_path / "x").read_bytes() == b""
