"""Talk to a training run or an export in the terminal, with images.

    python scripts/chat.py merged/llama3-8b-moslora --image photo.jpg
    you> what is on the table?

    /image FILE   show an image with the next question (several, if the model was trained with several)
    /clear        start a new conversation
    /exit         or end of input

Prompts are made by the function that made the training ids. Ctrl-C stops an answer; twice at the prompt, it exits.
"""

import argparse
import io
import sys
from pathlib import Path

from llava_moslora.data.images import load_image
from llava_moslora.errors import Refusal, run_script
from llava_moslora.inference.load import load
from llava_moslora.inference.stream import check_sampling, stream
from llava_moslora.text.conversation import Turn
from llava_moslora.text.tokenizer import IMAGE_TOKEN


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the --output_dir of a training, or an export of --format hf")
    parser.add_argument("--image", action="append", default=[], help="an image for the first question")
    parser.add_argument("--system", help="a system message")
    parser.add_argument("--max_new_tokens", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the most likely answer")
    parser.add_argument("--top_p", type=float, default=1.0)
    args = parser.parse_args()
    check_sampling(args.max_new_tokens, args.temperature, args.top_p)
    for stream_, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
        if isinstance(stream_, io.TextIOWrapper):  # bytes that are not text are refused below, or shown; not raised
            stream_.reconfigure(errors=errors)
    waiting = [open_image(file) for file in args.image]
    chat_model = load(args.model)
    turns: list[Turn] = first_turns(args.system)
    images: list = []
    while (line := ask_user()) is not None:
        command, _, rest = line.partition(" ")
        if command == "/exit":
            break
        try:
            if command == "/clear":
                turns, images, waiting = first_turns(args.system), [], []
            elif command == "/image":
                waiting.append(open_image(rest.strip()))
            elif line.strip():
                asked = [*turns, Turn("human", question(line, len(waiting)))]
                shown = images + waiting
                pieces = stream(
                    chat_model,
                    (shown, asked),
                    max_new_tokens=args.max_new_tokens,
                    temperature=args.temperature,
                    top_p=args.top_p,
                )
                text = print_answer(pieces)
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


def open_image(file: str):
    """
    Raises:
        Refusal: no such file, or not a usable image.
    """
    try:
        path = Path(file).expanduser().resolve()
    except (ValueError, RuntimeError, OSError) as error:  # a NUL, an unknown ~user, a loop of links
        raise Refusal("I-PATH", "not a path", file=file, found=error) from error
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
