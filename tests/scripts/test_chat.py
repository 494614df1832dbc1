"""A conversation in the terminal continues whatever is typed into it."""

import io
import sys

import pytest
from PIL import Image

from llava_moslora.errors import Refusal
from scripts import chat


@pytest.fixture
def talk(monkeypatch):
    """Chat with a model that answers with the length of the conversation; gives what was asked for, line by line."""
    monkeypatch.setattr(chat, "load", lambda _: "chat_model")
    monkeypatch.setattr(chat, "stream", lambda _, question, **__: iter([f"turn {len(question[1])}"]))

    def with_input(typed: bytes, *flags: str) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8"))
        monkeypatch.setattr(sys, "argv", ["chat.py", "model", *flags])
        chat.main()

    return with_input


@pytest.mark.parametrize(("typed", "message"), [
    (b"caf\xe9", "error[D-TEXT] not UTF-8"),
    (b"/image ~nobody-of-this-name/a.png", "error[I-PATH] ~nobody-of-this-name/a.png: not a path"),
    (b"/image a\0b", "error[I-PATH] a\\x00b: not a path"),
    (b"/image " + b"x" * 300, "error[I-PATH]"),
    (b"/image nothing.png", "error[I-MISSING]"),
    (b"/image .", "error[I-MISSING]"),
])  # fmt: skip
def test_what_cannot_be_used_is_refused_and_the_conversation_goes_on(talk, capsys, typed, message):
    talk(b"one\n" + typed + b"\ntwo\n")
    printed = capsys.readouterr()
    assert "turn 1" in printed.out and "turn 3" in printed.out  # the second question, after one and its answer
    assert printed.err.startswith(message) and printed.err.count("\n") == 1


@pytest.mark.parametrize("typed", ['"my pictures/a b.png"', "'my pictures/a b.png'", "my\\ pictures/a\\ b.png",
                                   "my pictures/a b.png", "it's.png", '"quoted".png'])  # fmt: skip
def test_an_images_name_is_read_as_in_a_shell(talk, capsys, monkeypatch, tmp_path, typed):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my pictures").mkdir()
    for name in ("my pictures/a b.png", "it's.png", '"quoted".png'):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    talk(f"/image {typed}\none\n".encode())
    printed = capsys.readouterr()
    assert "turn 1" in printed.out and printed.err == ""


def test_a_missing_image_is_not_looked_for_in_an_image_folder(talk, tmp_path):
    with pytest.raises(Refusal, match=r"I-MISSING\] .*/nope\.png: no such image; fix: check the name"):
        talk(b"", "--image", str(tmp_path / "nope.png"))


def test_ctrl_c_at_the_prompt(talk, capsys, monkeypatch):
    """Once it is a slip, twice it is meant."""
    lines = iter(["one", KeyboardInterrupt, "two", KeyboardInterrupt, KeyboardInterrupt, "three"])

    def typed(_prompt):
        if (line := next(lines)) is KeyboardInterrupt:
            raise KeyboardInterrupt
        return line

    monkeypatch.setattr("builtins.input", typed)
    talk(b"")
    assert "turn 3" in capsys.readouterr().out and next(lines) == "three"


def test_without_standard_input(talk, monkeypatch):
    def lost(_prompt):
        raise RuntimeError("input(): lost sys.stdin")

    monkeypatch.setattr("builtins.input", lost)
    talk(b"")


@pytest.mark.parametrize("flags", [
    "--temperature -1", "--temperature nan", "--temperature inf", "--top_p -1", "--top_p 0", "--top_p 1.5",
    "--top_p nan", "--max_new_tokens 0",
])  # fmt: skip
def test_flags_out_of_range(talk, monkeypatch, flags):
    monkeypatch.setattr(chat, "load", lambda _: pytest.fail("the model was loaded"))
    with pytest.raises(Refusal, match=rf"C-FLAG\] {flags.split()[0]}: out of range"):
        talk(b"", *flags.split())


@pytest.mark.parametrize("leave", [b"/exit", b"/quit", b"/quit  ", b"/exit now"])
def test_leaving(talk, capsys, leave):
    talk(b"one\n" + leave + b"\ntwo\n")
    printed = capsys.readouterr().out
    assert "turn 1" in printed and "turn 3" not in printed


def test_help_lists_the_commands(talk, capsys):
    talk(b"/help\none\n")
    printed = capsys.readouterr().out
    assert all(command.split()[0] in printed for command in chat.COMMANDS) and "turn 1" in printed


@pytest.mark.parametrize("typed", [b"/Quit", b"/imagine", b"/bye bye", b"/"])
def test_unknown_commands_are_not_asked(talk, capsys, typed):
    talk(typed + b"\none\n")
    printed = capsys.readouterr()
    command = typed.decode().split()[0]
    assert printed.err.startswith(
        f"error[C-COMMAND] unknown; found {command}; expected /image FILE, /clear, /help, /exi"
    )
    assert "turn 1" in printed.out and "turn 3" not in printed.out


def test_a_question_may_begin_with_a_slash(talk, capsys):
    talk(b" /etc is what?\n")
    printed = capsys.readouterr()
    assert "turn 1" in printed.out and not printed.err
