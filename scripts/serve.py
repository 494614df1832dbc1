"""A small local web page to chat about images with one model, or with two side by side.

    python scripts/serve.py merged/llama3-8b-moslora
    python scripts/serve.py runs/llama3-8b-moslora --compare_untrained
    python scripts/serve.py runs/llama3-8b-lora runs/llama3-8b-moslora --names LoRA MoSLoRA

Runs, exports, or one of each. It listens on this machine only, unless --host names another address; there is no
password. Only requests to the server's own host names are accepted: localhost, the address of --host (0.0.0.0: every
address of this machine), and those of --allowed_hosts. Nothing is fetched from a network, and what is uploaded is
deleted after a day and at the end. Ctrl-C, SIGTERM or a closed terminal ends it, with status 0 once the page is there.
Needs gradio: pip install 'llava_moslora[serve]'.
"""

import argparse
import errno
import html
import math
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava_moslora.errors import Refusal, defect, known_failure, run_script
from llava_moslora.flags import ScriptParser
from llava_moslora.noise import quiet_libraries


def parse(argv: list[str]) -> argparse.Namespace:
    parser = ScriptParser(__doc__)
    parser.add_argument("model", nargs="+", help="one or two runs or exports")
    parser.add_argument("--names", nargs="+", metavar="NAME", help="their names on the page; default: their folders")
    parser.add_argument("--compare_untrained", action="store_true", help="next to a run: its model before training")
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1; 0.0.0.0: all interfaces")
    parser.add_argument("--port", type=int, default=7860, metavar="N", help="default: 7860")
    parser.add_argument(
        "--allowed_hosts", nargs="+", default=[], metavar="NAME", help="further host names of this server"
    )
    parser.add_argument("--max_seconds", type=float, default=600, metavar="N", help="of an answer; default: 600")
    parser.add_argument("--max_waiting", type=int, default=8, metavar="N", help="questions in the queue; default: 8")
    args = parser.parse_args(argv)
    count = len(args.model) + args.compare_untrained
    if count > 2:
        raise Refusal("C-FLAG", "one or two models", key="model", found=f"{count} models")
    args.names = args.names or default_names(args.model) + ["untrained"] * args.compare_untrained
    if len(args.names) != count:
        raise Refusal("C-FLAG", "one name for each model", key="--names", found=len(args.names), expected=count)
    if len(set(args.names)) < count:
        raise Refusal("C-FLAG", "two models with the same name", key="--names", found=" ".join(args.names))
    if not 0 < args.max_seconds < math.inf:
        raise Refusal("C-FLAG", "out of range", key="--max_seconds", found=args.max_seconds, expected="above 0")
    if args.max_waiting < 1:
        raise Refusal("C-FLAG", "out of range", key="--max_waiting", found=args.max_waiting, expected="at least 1")
    return args


def default_names(models: list[str]) -> list[str]:
    """Their folders' names; of two that are alike, the paths as given."""
    names = [Path(model).resolve().name for model in models]
    return names if len(set(names)) == len(names) else models


if __name__ == "__main__":  # --help and a wrong flag are answered here, before the seconds that these imports take
    run_script(lambda: parse(sys.argv[1:]))
    quiet_libraries()

from llava_moslora.data.images import load_image
from llava_moslora.inference.generate import Question
from llava_moslora.inference.load import ChatModel, load
from llava_moslora.inference.stream import stream
from llava_moslora.inference.web_guard import Guard
from llava_moslora.text.conversation import Turn
from llava_moslora.text.tokenizer import IMAGE_TOKEN

# Of a conversation: the prompt is computed in one piece, which no time limit can interrupt.
MAX_CHARACTERS, MAX_IMAGES = 20_000, 8
MAX_NEW_TOKENS = 1024
MAX_IMAGE_BYTES = 50 * 1024**2
MAX_CONNECTIONS = 128
DAY = 24 * 60 * 60


def main() -> None:
    args = parse(sys.argv[1:])
    folder = tempfile.TemporaryDirectory(prefix="llava_moslora-", ignore_cleanup_errors=True)
    with folder as uploads, listen(args.host, args.port) as listener:
        prepare_gradio(uploads)
        chat_models = [load(model) for model in args.model]
        if args.compare_untrained:
            chat_models.append(load(args.model[0], trained=False))
        serve(dict(zip(args.names, chat_models, strict=True)), listener, Path(uploads), args)


def prepare_gradio(uploads: str) -> None:
    """Import gradio, with its settings for this process: nothing leaves this machine, and its files are in ``uploads``.

    Raises:
        Refusal: E-PACKAGE, it is not installed.
    """
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1", "GRADIO_TEMP_DIR": uploads}
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise Refusal(
            "E-PACKAGE", "the web page needs gradio", found=error, fix="pip install 'llava_moslora[serve]'"
        ) from error


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there. It is opened before the models are loaded: no other process can take the port.

    Raises:
        Refusal: C-FLAG, no address of this machine, or no port; E-PORT, the port is already in use.
    """
    if not 0 < port < 2**16:
        raise Refusal("C-FLAG", "no port", key="--port", found=port, expected="1 to 65535")
    listener = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # where a server has just ended
        listener.bind(address)
        listener.listen()
    except (OSError, UnicodeError) as error:
        if listener is not None:
            listener.close()
        number, found = getattr(error, "errno", None), f"{host}:{port}"
        if number == errno.EADDRINUSE:
            what, fix = "the port is already in use", "choose another"
            raise Refusal("E-PORT", what, key="--port", found=found, fix=fix) from error
        if number == errno.EACCES:
            raise Refusal("E-PORT", "not permitted", key="--port", found=found, fix="1024 or above") from error
        raise Refusal(
            "C-FLAG", "not an address of this machine", key="--host", found=f"{host}: {error}",
            fix="127.0.0.1 for this machine only, 0.0.0.0 for all interfaces",
        ) from error  # fmt: skip
    return listener


def serve(
    chat_models: dict[str, ChatModel], listener: socket.socket, uploads: Path, settings: argparse.Namespace
) -> None:
    """Answer requests until Ctrl-C, SIGTERM or SIGHUP; an answer that is being given ends then."""
    import fastapi
    import gradio
    import uvicorn

    stopped = threading.Event()

    class Server(uvicorn.Server):
        def handle_exit(self, *_) -> None:  # of a signal; uvicorn's own raises it again at the end
            stopped.set()
            self.should_exit = True

    blocks = page(chat_models, settings.max_seconds, settings.max_waiting, stopped)
    app = gradio.mount_gradio_app(
        fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None), blocks, path="/",
        max_file_size=MAX_IMAGE_BYTES, footer_links=[], run_history=False, ssr_mode=False, mcp_server=False, pwa=False,
    )  # fmt: skip
    blocks.has_launched = True  # which mounting leaves out: without it, gradio copies any file that a request names
    names = tuple(settings.allowed_hosts)
    guard = Guard(
        app, host=settings.host, names=names, upload_path="/gradio_api/upload", uploads=uploads, stopped=stopped
    )
    config = uvicorn.Config(
        guard, log_level="warning", ws="none", lifespan="on", limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=2, server_header=False,
    )  # fmt: skip
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    print(f"the page: http://{host}:{settings.port}", flush=True)
    server = Server(config)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup sets it; uvicorn takes the two other signals
        signal.signal(signal.SIGHUP, server.handle_exit)
    server.run(sockets=[listener])
    print("stopped", flush=True)


def page(chat_models: dict[str, ChatModel], max_seconds: float, max_waiting: int, stopped: threading.Event):
    """The page as gradio's ``Blocks``: an image, a question, and one conversation per model."""
    import gradio

    with gradio.Blocks(title="llava_moslora", analytics_enabled=False, delete_cache=(DAY // 24, DAY)) as blocks:
        gradio.Markdown("### " + " · ".join(chat_models))
        with gradio.Row():
            with gradio.Column(scale=1):
                image = as_sent(gradio.Image(label="image", sources=["upload", "clipboard"], height=300))
                text = gradio.Textbox(label="question", placeholder="What is shown?", max_lines=8, elem_id="question")
                with gradio.Row():
                    ask = gradio.Button("Ask", variant="primary", elem_id="ask")
                    clear = gradio.Button("Start over", elem_id="clear")
                length = gradio.Slider(1, MAX_NEW_TOKENS, 256, step=1, label="longest answer, in tokens")
                warmth = gradio.Slider(0, 1.5, 0, step=0.1, label="temperature (0: the most likely answer)")
            with gradio.Column(scale=2), gradio.Row():
                chats = [
                    gradio.Chatbot(label=name, height=560, render_markdown=False, buttons=["copy"])
                    for name in chat_models
                ]
        state = gradio.State([], time_to_live=DAY)  # the rounds, as answer_round makes them

        def answer(rounds: list, file: str | None, question: str, tokens: int, temperature: float):
            """Yields the conversations while the models answer, one model after the other."""
            try:
                how = sampling(tokens, temperature) | {"max_seconds": max_seconds, "stopped": stopped}
                file = uploaded(file)
                for said in answer_round(list(chat_models.values()), rounds, file, question, how):
                    if isinstance(said, str):
                        gradio.Warning(said)
                    else:
                        yield [said, "", *chat_messages(said, len(chat_models))]
            except Exception as error:  # the boundary: whatever it is, it is told in one line on the page
                refusal = known_failure(error) or defect(error)
                # gradio's Error would cover the question, which is to be corrected, and the conversation
                gradio.Warning(html.escape(refusal.line()), duration=None, title="Refused")
                yield [rounds, question, *chat_messages(rounds, len(chat_models))]

        inputs, outputs = [state, image, text, as_sent(length), as_sent(warmth)], [state, text, *chats]
        for event in (ask.click, text.submit):  # one at a time, of all who use the page
            event(answer, inputs, outputs, concurrency_id="models", concurrency_limit=1, api_name=event.event_name)
        clear.click(lambda: [[], "", *chat_messages([], len(chat_models))], None, outputs, queue=False)
    return blocks.queue(max_size=max_waiting)


def as_sent(component: Any) -> Any:
    """The component, whose value comes as it was sent, and is refused in :func:`page`. As gradio has it, it would fetch
    or copy any file that a request names, and print a traceback for what it cannot use."""

    async def where_it_is(file: str) -> str:
        return file

    component.preprocess = lambda value: getattr(value, "path", value)
    component.async_move_resource_to_block_cache = where_it_is
    return component


def uploaded(file: str | None) -> str | None:
    """Raises I-PATH for a file that was not uploaded."""
    folder = Path(os.environ["GRADIO_TEMP_DIR"]).resolve()
    if file is not None and not Path(os.path.realpath(file.replace("\0", ""))).is_relative_to(folder):
        raise Refusal("I-PATH", "not an uploaded image", found=file, fix="drop an image on the page")
    return file


def sampling(tokens: Any, temperature: Any) -> dict[str, Any]:
    """Raises C-FLAG for what the page's two sliders cannot say."""
    for what, value, most in (("tokens", tokens, MAX_NEW_TOKENS), ("temperature", temperature, 2)):
        if not isinstance(value, int | float) or not 0 <= value <= most:
            raise Refusal("C-FLAG", "out of range", key=what, found=value, expected=f"0 to {most}")
    return {"max_new_tokens": int(tokens), "temperature": float(temperature)}


def answer_round(
    chat_models: list[ChatModel], rounds: list[dict], file: str | None, question: str, how: dict[str, Any]
) -> Iterator[list[dict] | str]:
    """Yields ``rounds`` and the new one, whose answers grow; and a sentence where an answer ended early.

    A round is its image's file (None where no new one is shown), its question, and an answer of each model.

    Raises:
        Refusal: as :func:`conversation` and :func:`llava_moslora.inference.stream.stream`.
    """
    if not question.strip():
        raise Refusal("D-EMPTY", "no question", fix="type one")
    shown = [past["file"] for past in rounds if past["file"] is not None]
    new = file if not shown or shown[-1] != file else None  # the image is shown once
    this: dict[str, Any] = {"file": new, "question": question.strip(), "answers": [""] * len(chat_models)}
    rounds = [*rounds, this]
    for number, chat_model in enumerate(chat_models):
        begun = time.monotonic()
        for piece in stream(chat_model, conversation(rounds, number), **how):
            this["answers"][number] += piece
            yield rounds
        if time.monotonic() - begun > how["max_seconds"]:
            yield f"The answer was stopped after {how['max_seconds']:g} seconds (--max_seconds)."
    yield rounds


def conversation(rounds: list[dict], number: int) -> Question:
    """What model ``number`` is asked: its own earlier answers, and the images where they were shown.

    Raises:
        Refusal: the placeholder was typed, the conversation is too long, or an image cannot be used.
    """
    characters = sum(len(past["question"]) + len(past["answers"][number]) for past in rounds)
    shown = sum(past["file"] is not None for past in rounds)
    for found, most, what in ((characters, MAX_CHARACTERS, "characters"), (shown, MAX_IMAGES, "images")):
        if found > most:
            expected, fix = f"at most {most} {what}", "shorten the question, or start over"
            raise Refusal("D-LENGTH", "the conversation is too long", found=found, expected=expected, fix=fix)
    turns, images = [], []
    for past in rounds:
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
