"""Talk to a training run or an export in the terminal, with images.

    python scripts/chat.py merged/llama3-8b-moslora --image photo.jpg
    you> what is on the table?

    /image FILE   show an image with the next question (several, if the model was trained with several)
    /clear        start a new conversation
    /help         list these commands
    /exit         or /quit, or end of input

Prompts are built exactly as in training. Ctrl-C stops an answer; twice at the prompt, it exits.
"""

import argparse
import io
import os
import shlex
import sys
from pathlib import Path

from llava_moslora.errors import Refusal, run_script
from llava_moslora.flags import ScriptParser
from llava_moslora.noise import quiet_libraries


def parse(argv: list[str]) -> argparse.Namespace:
    parser = ScriptParser(__doc__)
    parser.add_argument("model", help="the --output_dir of a training run, or an export of --format hf or llm")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="an image for the first question")
    parser.add_argument("--system", metavar="TEXT", help="a system message; default: the template's, if it has one")
    parser.add_argument("--max_new_tokens", type=int, default=512, metavar="N", help="longest answer; default: 512")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="X", help="default: 0, greedy; above: sampling"
    )
    parser.add_argument("--top_p", type=float, default=1.0, metavar="X", help="nucleus sampling; default: 1, off")
    return parser.parse_args(argv)


if __name__ == "__main__":  # --help and a wrong flag are answered here, before the seconds that these imports take
    run_script(lambda: parse(sys.argv[1:]))
    quiet_libraries()

from llava_moslora.data.images import load_image
from llava_moslora.inference.load import load
from llava_moslora.inference.stream import check_sampling, stream
from llava_moslora.text.conversation import Turn
from llava_moslora.text.tokenizer import IMAGE_TOKEN

COMMANDS = {"/image FILE": "show it with the next question", "/clear": "start a new conversation",
            "/help": "list these commands", "/exit": "or /quit, or end of input"}  # fmt: skip


def main() -> None:
    args = parse(sys.argv[1:])
    check_sampling(args.max_new_tokens, args.temperature, args.top_p)
    for stream_, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
        if isinstance(stream_, io.TextIOWrapper):  # bytes that are not text are refused below, or shown; not raised
            stream_.reconfigure(errors=errors)
    waiting = [open_image(file) for file in args.image]
    chat_model = load(args.model)
    turns: list[Turn] = first_turns(args.system)
    images: list = []
    while (line := ask_user()) is not None:
        command, _, rest = line.rstrip().partition(" ")  # a line that begins with a space is a question
        if command in ("/exit", "/quit"):
            break
        try:
            if command == "/clear":
                turns, images, waiting = first_turns(args.system), [], []
            elif command == "/image":
                waiting.append(open_image(unquoted(rest.strip())))
            elif command == "/help":
                print("\n".join(f"{name:12}  {text}" for name, text in COMMANDS.items()), flush=True)
            elif command.startswith("/"):
                fix = "put a space before it to send it to the model"
                raise Refusal("C-COMMAND", "unknown", found=command, expected=", ".join(COMMANDS), fix=fix)
            elif line.strip():
                asked, shown = [*turns, Turn("human", question(line, len(waiting)))], images + waiting
                sampling = {"temperature": args.temperature, "top_p": args.top_p}
                text = print_answer(stream(chat_model, (shown, asked), max_new_tokens=args.max_new_tokens, **sampling))
                turns, images, waiting = [*asked, Turn("gpt", text)], shown, []
        except Refusal as refusal:  # of this question: the conversation continues without it
            print(refusal.line(), file=sys.stderr, flush=True)
        except KeyboardInterrupt:  # while the question or an image was prepared
            print(flush=True)


def first_turns(system: str | None) -> list[Turn]:
    return [] if system is None else [Turn("system", system)]


def ask_user() -> str | None:
    """A line, or None at the end of input, or after Ctrl-C twice in a row. A script's input is echoed, so that its
    output reads as a conversation."""
    for _ in range(2):
        try:
            line = input("you> ")
        except KeyboardInterrupt:
            print("\n(Ctrl-C again, or /exit, to leave)", flush=True)
            continue
        except (EOFError, RuntimeError):  # RuntimeError: there is no standard input
            print()
            return None
        if not sys.stdin.isatty():
            print(line)
        return line
    return None


def unquoted(name: str) -> str:
    """A file's name as a shell reads it, quoted or with backslashes; as it is where such a file is there."""
    try:
        words = shlex.split(name)
    except ValueError:  # one quote alone, as in it's.png
        return name
    return words[0] if len(words) == 1 and not os.path.exists(name) else name


def open_image(file: str):
    """Raises a refusal where there is no such file, or no usable image in it."""
    try:
        path = Path(file).expanduser().resolve()
        found = path.is_file()
    except (ValueError, RuntimeError, OSError) as error:  # a NUL, an unknown ~user, a loop of links, too long a name
        raise Refusal("I-PATH", "not a path", file=file, found=error) from error
    if not found:
        what = "a folder, not an image" if path.is_dir() else "no such image"
        raise Refusal("I-MISSING", what, file=path, fix="check the name; a relative one is from the current folder")
    return load_image(path.name, path.parent)


def question(text: str, images: int) -> str:
    """The text of a turn below its images, as in LLaVA's data.

    Raises:
        Refusal: the placeholder was typed, or bytes that are not text.
    """
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise Refusal("D-TEXT", "not UTF-8", found=text, fix="set the terminal, or the file, to UTF-8")
    if IMAGE_TOKEN in text:
        what, fix = "the image placeholder must not be typed", "/image FILE shows an image with the next question"
        raise Refusal("D-IMAGES", what, found=text, fix=fix)
    return f"{IMAGE_TOKEN}\n" * images + text.strip()


def print_answer(pieces) -> str:
    """Print an answer as it comes; Ctrl-C stops it, and what was printed until then stays in the conversation."""
    text = ""
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
            text += piece
    except KeyboardInterrupt:
        pieces.close()
        print(" …", end="")
    print(flush=True)
    return text


if __name__ == "__main__":
    run_script(main)
