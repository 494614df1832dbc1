"""A small local web page: show an image to one model, or to two side by side, and talk.

    python scripts/serve.py merged/llama3-8b-moslora
    python scripts/serve.py runs/llama3-8b-moslora --compare_untrained
    python scripts/serve.py runs/llama3-8b-lora runs/llama3-8b-moslora --names LoRA MoSLoRA

Runs, exports, or one of each. It listens on this machine only, unless --host names another address; there is no
password.
Needs gradio: pip install 'llava_moslora[serve]'.
"""

import argparse
import errno
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava_moslora.errors import Refusal, run_script
from llava_moslora.flags import ScriptParser
from llava_moslora.noise import quiet_libraries


def parse(argv: list[str]) -> argparse.Namespace:
    parser = ScriptParser(__doc__)
    parser.add_argument("model", nargs="+", help="one or two runs or exports")
    parser.add_argument("--names", nargs="+", metavar="NAME", help="what the page calls them; default: their folders")
    parser.add_argument("--compare_untrained", action="store_true", help="next to a run: its model before training")
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1; 0.0.0.0: every network")
    parser.add_argument("--port", type=int, default=7860, metavar="N", help="default: 7860")
    args = parser.parse_args(argv)
    count = len(args.model) + args.compare_untrained
    if count > 2:
        raise Refusal("C-FLAG", "one or two models", key="model", found=f"{count} models")
    args.names = args.names or [Path(model).name for model in args.model] + ["untrained"] * args.compare_untrained
    if len(args.names) != count:
        raise Refusal("C-FLAG", "one name for each model", key="--names", found=len(args.names), expected=count)
    return args


if __name__ == "__main__":  # --help and a wrong flag are answered here, before the seconds that these imports take
    run_script(lambda: parse(sys.argv[1:]))
    quiet_libraries()

from llava_moslora.data.images import load_image
from llava_moslora.inference.generate import Question
from llava_moslora.inference.load import ChatModel, load, load_run
from llava_moslora.inference.stream import stream
from llava_moslora.text.conversation import Turn
from llava_moslora.text.tokenizer import IMAGE_TOKEN

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # nothing leaves this machine
MAX_CHARACTERS = 20_000  # of a question; attention over a megabyte of text keeps the machine busy for minutes
MAX_IMAGE_BYTES = 50 * 1024**2


def main() -> None:
    args = parse(sys.argv[1:])
    check_address(args.host, args.port)
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise Refusal(
            "E-PACKAGE", "the web page needs gradio", found=error, fix="pip install 'llava_moslora[serve]'"
        ) from error
    chat_models = [load(model) for model in args.model]
    if args.compare_untrained:
        chat_models.append(load_run(args.model[0], trained=False))
    page(dict(zip(args.names, chat_models, strict=True))).launch(**launch_options(args.host, args.port))


def launch_options(host: str, port: int) -> dict:
    """How the page is served. On this machine alone, only to requests for this machine by its own names: the page of
    another site, whose name was made to mean 127.0.0.1, would use that name."""
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    own = ["127.0.0.1", "localhost"]
    middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=own)] if host in own else []
    return {
        "server_name": host,
        "server_port": port,
        "share": False,
        "max_file_size": MAX_IMAGE_BYTES,
        "app_kwargs": {"middleware": middleware},
    }


def check_address(host: str, port: int) -> None:
    """Check, before a model is loaded, that the page can be served there.

    Raises:
        Refusal: C-FLAG, no address of this machine, or no port; E-PORT, another process listens there.
    """
    if not 0 < port < 2**16:
        raise Refusal("C-FLAG", "no port", key="--port", found=port, expected="1 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
            probe.bind(address)
    except (OSError, UnicodeError) as error:
        number, found = getattr(error, "errno", None), f"{host}:{port}"
        if number == errno.EADDRINUSE:
            what, fix = "another process listens there", "choose another"
            raise Refusal("E-PORT", what, key="--port", found=found, fix=fix) from error
        if number == errno.EACCES:
            raise Refusal("E-PORT", "not permitted", key="--port", found=found, fix="1024 or above") from error
        raise Refusal(
            "C-FLAG", "no address of this machine", key="--host", found=f"{host}: {error}",
            fix="127.0.0.1 for this machine alone, 0.0.0.0 for every network",
        ) from error  # fmt: skip


def page(chat_models: dict[str, ChatModel]):
    """The page as gradio's ``Blocks``: an image, a question, and one conversation per model."""
    import gradio

    with gradio.Blocks(title="llava_moslora", analytics_enabled=False) as blocks:
        gradio.Markdown("### " + " · ".join(chat_models))
        with gradio.Row():
            with gradio.Column(scale=1):
                image = gradio.Image(type="filepath", label="image", sources=["upload", "clipboard"], height=300)
                text = gradio.Textbox(
                    label="question", placeholder="What is shown?", elem_id="question", max_length=MAX_CHARACTERS
                )
                with gradio.Row():
                    ask = gradio.Button("Ask", variant="primary", elem_id="ask")
                    clear = gradio.Button("Start over")
                length = gradio.Slider(1, 1024, 256, step=1, label="longest answer, in tokens")
                temperature = gradio.Slider(0, 1.5, 0, step=0.1, label="temperature (0: the most likely answer)")
            with gradio.Column(scale=2), gradio.Row():
                chats = [
                    gradio.Chatbot(label=name, height=560, render_markdown=False, buttons=["copy"])
                    for name in chat_models
                ]
        state = gradio.State([])  # (file of the image or None, question) and the answers, round by round

        def answer(rounds: list, file: str | None, question: str, tokens: int, temperature: float):
            """Yields the conversations while the models answer, one model after the other."""
            if not question.strip():
                yield [rounds, question, *chat_messages(rounds, len(chat_models))]
                return
            earlier = [past for past in rounds if past["file"] is not None]
            new = file if not earlier or earlier[-1]["file"] != file else None  # the image is shown once
            this: dict[str, Any] = {"file": new, "question": question.strip(), "answers": [""] * len(chat_models)}
            rounds = [*rounds, this]
            for number, chat_model in enumerate(chat_models.values()):
                try:
                    asked = conversation(rounds, number)
                    for piece in stream(chat_model, asked, max_new_tokens=int(tokens), temperature=temperature):
                        this["answers"][number] += piece
                        yield [rounds, "", *chat_messages(rounds, len(chat_models))]
                except Refusal as refusal:
                    raise gradio.Error(refusal.line(), print_exception=False) from refusal
            yield [rounds, "", *chat_messages(rounds, len(chat_models))]

        inputs, outputs = [state, image, text, length, temperature], [state, text, *chats]
        ask.click(answer, inputs, outputs)
        text.submit(answer, inputs, outputs)
        clear.click(lambda: [[], "", *chat_messages([], len(chat_models))], None, outputs)
    return blocks


def conversation(rounds: list[dict], number: int) -> Question:
    """What model ``number`` is asked: its own earlier answers, and the images where they were shown.

    Raises:
        Refusal: the placeholder was typed, the question is too long, or an image cannot be used.
    """
    turns, images = [], []
    for past in rounds:
        if len(past["question"]) > MAX_CHARACTERS:
            expected = f"at most {MAX_CHARACTERS} characters"
            found = len(past["question"])
            raise Refusal("D-LENGTH", "the question is too long", found=found, expected=expected, fix="shorten it")
        if IMAGE_TOKEN in past["question"]:
            what = "the image placeholder must not be typed"
            raise Refusal("D-IMAGES", what, found=past["question"], fix="drop an image on the page")
        prefix = ""
        if past["file"] is not None:
            path = Path(past["file"])
            images.append(load_image(path.name, path.parent))
            prefix = f"{IMAGE_TOKEN}\n"
        turns += [Turn("human", prefix + past["question"]), Turn("gpt", past["answers"][number])]
    return images, turns[:-1]


def chat_messages(rounds: list[dict], models: int) -> Iterator[list[dict]]:
    """The conversation of each model as gradio's messages. Answers are text: markup in them is not rendered."""
    for number in range(models):
        messages = []
        for past in rounds:
            messages.append({"role": "user", "content": past["question"]})
            messages.append({"role": "assistant", "content": past["answers"][number]})
        yield messages


if __name__ == "__main__":
    run_script(main)
