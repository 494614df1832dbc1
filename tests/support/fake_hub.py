"""A Hub on this machine, in memory: what pushing an export asks of the real one, over HTTP."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

REPO = r"/api/models/(?P<repo>[^/]+/[^/]+)"


class FakeHub(ThreadingHTTPServer):
    """``repos``: name → ``{"private": bool, "files": {path: bytes}, "titles": [newest first]}``; ``fails``: a path's
    pattern → status to answer it with; ``large``: SHA-256 → what came by LFS; ``asked``: the paths of all requests."""

    def __init__(self, role: str = "write"):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.role, self.repos, self.large, self.fails, self.asked = role, {}, {}, {}, []
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def add(self, name: str, files: dict[str, bytes], title: str = "by hand", private: bool = False) -> None:
        self.repos[name] = {"private": private, "files": {".gitattributes": b""} | files, "titles": [title]}


def head(repo: dict) -> str:
    return hashlib.sha1("\n".join(repo["titles"]).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def handle_request(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, hub = self.path.split("?")[0], self.server
        hub.asked.append(path)
        if status := next((status for pattern, status in hub.fails.items() if re.search(pattern, path)), None):
            return self.answer(status, {"error": "the Hub says no"})
        if path.startswith("/lfs/"):
            hub.large[path.removeprefix("/lfs/")] = body
            return self.answer(200, {})
        if self.headers.get("Authorization") != "Bearer hf_test":
            return self.answer(401, {"error": "Invalid username or password."})
        if path == "/api/whoami-v2":
            return self.answer(200, {"name": "me", "auth": {"accessToken": {"role": hub.role}}})
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            hub.add(name, {}, "initial commit", private=asked.get("visibility") == "private")
            return self.answer(200, {"url": f"{hub.url}/{name}"})
        if path.endswith("/info/lfs/objects/batch"):
            asked = json.loads(body)["objects"]
            actions = [one | {"actions": {"upload": {"href": f"{hub.url}/lfs/{one['oid']}"}}} for one in asked]
            return self.answer(200, {"transfer": "basic", "objects": actions})
        found = re.match(rf"{REPO}|/(?P<other>[^/]+/[^/]+)/resolve/", path)
        repo = hub.repos.get(found["repo"] or found["other"])
        if repo is None:
            return self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        if "/resolve/" in path:
            content = repo["files"][path.split("/")[-1]]
            return self.answer(200, content, {"X-Repo-Commit": head(repo), "ETag": hashlib.sha1(content).hexdigest()})
        if "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in names}
            files = [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes.items()]
            return self.answer(200, {"files": files})
        if "/commits/" in path:
            rows = [{"id": head(repo), "authors": [], "date": "2026-01-01T00:00:00.000Z", "title": title, "message": ""}
                    for title in repo["titles"]]  # fmt: skip
            return self.answer(200, rows)
        if "/commit/" in path:
            return self.commit(found["repo"], [json.loads(line) for line in body.splitlines()])
        siblings = [{"rfilename": name} for name in repo["files"]]
        self.answer(200, {"id": found["repo"], "sha": head(repo), "private": repo["private"], "siblings": siblings})

    do_GET = do_POST = do_PUT = do_HEAD = handle_request

    def commit(self, name, lines):
        repo = self.server.repos[name]
        if lines[0]["value"]["parentCommit"] != head(repo):
            return self.answer(412, {"error": "A commit has happened since."})
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "deletedFile":
                del repo["files"][value["path"]]
            else:
                large = line["key"] == "lfsFile"
                content = self.server.large[value["oid"]] if large else base64.b64decode(value["content"])
                repo["files"][value["path"]] = content
        repo["titles"].insert(0, lines[0]["value"]["summary"])
        self.answer(200, {"commitUrl": f"{self.server.url}/{name}/commit/{head(repo)}", "commitOid": head(repo)})

    def answer(self, status, content, headers=()):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
