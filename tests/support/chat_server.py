"""An OpenAI-compatible server on this machine that replies as a test says, and keeps what it was sent."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Reply = tuple[int, str, dict[str, str]]  # status, body, headers


def completion(text: str | None) -> Reply:
    message = {"role": "assistant", "content": text}
    return 200, json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}), {}


class ChatServer:
    """A context manager.

    Attributes:
        url: of the server, without ``/v1``.
        requests: (path, headers, body as it was sent) of every request.

    Args:
        reply: body of a request, as JSON → what to reply; a plain text is a chat model's. What it raises closes the
            connection without a reply.
    """

    def __init__(self, reply: Callable[[dict], str | Reply | None]):
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        kept = self.requests

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                kept.append((self.path, dict(self.headers), body))
                try:
                    made = reply(json.loads(body))
                except Exception:
                    self.close_connection = True
                    return
                status, text, headers = made if isinstance(made, tuple) else completion(made)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text.encode())

            do_GET = do_POST

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # a client that no longer waits
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    @property
    def bodies(self) -> list[dict]:
        return [json.loads(body) for _, _, body in self.requests]

    def __enter__(self) -> "ChatServer":
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
