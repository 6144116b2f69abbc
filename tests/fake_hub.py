"""A local substitute for the Hugging Face hub: the part of its HTTP API that writes and reads a repository.

It follows the requests and the responses of ``huggingface_hub``. Run as a script, it performs a test's actions in a
process whose ``HF_ENDPOINT`` is such a server.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse

import yaml

COMMIT = "0" * 39 + "1"


class FakeHub(ThreadingHTTPServer):
    """A server; ``repos[name][revision][path]`` holds the files' contents, and ``asked`` the requests."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.objects: dict[str, bytes] = {}
        self.asked: list[tuple[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A server that runs inside the context."""
    hub = FakeHub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlparse(self.path).path)
        self.server.asked.append((self.command, path))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for pattern, answer in _ROUTES.items():
            if found := re.fullmatch(pattern, f"{self.command} {path}"):
                answer(self, body, **found.groupdict())
                return
        self._send(404, {"error": f"no route for {self.command} {path}"})

    def _send(self, status: int, data: Any = None, raw: bytes | None = None, **headers: str) -> None:
        content = json.dumps(data).encode() if raw is None else raw
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'someone'}/{asked['name']}"
        there = name in self.server.repos
        self.server.repos.setdefault(name, {"main": {}})
        self._send(409 if there else 200, {"url": f"{self.server.url}/{name}", "id": name})

    def branch(self, body: bytes, repo: str, revision: str) -> None:
        files = self.server.repos[repo]
        there = revision in files
        files.setdefault(revision, dict(files["main"]))
        self._send(409 if there else 200, {})

    def validate(self, body: bytes) -> None:
        _, header, _ = json.loads(body)["content"].split("---\n", 2)
        told = yaml.safe_load(header)
        errors = (
            []
            if isinstance(told, dict) and isinstance(told.get("tags"), list)
            else [{"message": "no header"}]
        )
        self._send(400 if errors else 200, {"errors": errors, "warnings": []})

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self._send(200, {"files": files})

    def batch(self, body: bytes, repo: str) -> None:
        objects = [
            {**each, "actions": {"upload": {"href": f"{self.server.url}/objects/{each['oid']}"}}}
            for each in json.loads(body)["objects"]
        ]
        self._send(200, {"transfer": "basic", "objects": objects})

    def put(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.objects[oid] = body
        self._send(200, {})

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        files = self.server.repos[repo][revision]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
        self._send(200, {"commitUrl": f"{self.server.url}/{repo}/commit/{COMMIT}", "commitOid": COMMIT})

    def info(self, body: bytes, repo: str, revision: str = "main") -> None:
        files = self.server.repos.get(repo, {}).get(revision)
        if files is None:
            self._send(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return
        siblings = [{"rfilename": name} for name in files]
        self._send(200, {"id": repo, "sha": COMMIT, "siblings": siblings, "private": False})

    def tree(self, body: bytes, repo: str, revision: str) -> None:
        files = self.server.repos[repo][self._named(repo, revision)]
        entries = [
            {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for name, data in files.items()
        ]
        self._send(200, entries)

    def resolve(self, body: bytes, repo: str, revision: str, file: str) -> None:
        data = self.server.repos.get(repo, {}).get(self._named(repo, revision), {}).get(file)
        if data is None:
            self._send(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
            return
        tag = f'"{hashlib.sha1(data).hexdigest()}"'
        self._send(200, raw=data, X_Repo_Commit=COMMIT, ETag=tag)

    def _named(self, repo: str, revision: str) -> str:
        return "main" if revision == COMMIT else revision


_REPO, _REVISION = r"(?P<repo>[\w-]+/[\w.-]+)", r"(?P<revision>[^/]+)"
_ROUTES = {
    "POST /api/repos/create": _Handler.create,
    "POST /api/validate-yaml": _Handler.validate,
    f"POST /api/models/{_REPO}/branch/{_REVISION}": _Handler.branch,
    f"POST /api/models/{_REPO}/preupload/{_REVISION}": _Handler.preupload,
    f"POST /api/models/{_REPO}/commit/{_REVISION}": _Handler.commit,
    rf"POST /{_REPO}\.git/info/lfs/objects/batch": _Handler.batch,
    r"PUT /objects/(?P<oid>\w+)": _Handler.put,
    f"GET /api/models/{_REPO}/tree/{_REVISION}": _Handler.tree,
    f"GET /api/models/{_REPO}/revision/{_REVISION}": _Handler.info,
    f"GET /api/models/{_REPO}": _Handler.info,
    rf"(GET|HEAD) /{_REPO}/resolve/{_REVISION}/(?P<file>.+)": _Handler.resolve,
}


def _push_and_load() -> None:
    """Push, also to a branch; let a person change the card; push again; and load the result."""
    import sys
    from pathlib import Path

    import torch
    from huggingface_hub import HfApi

    import rankwise as rw
    from block_world import X, block, lora

    folder, repo = Path(sys.argv[1]), sys.argv[2]
    model = rw.get_peft_model(block(), lora()).eval()
    model.save_pretrained(folder)
    assert model.push_to_hub(repo, token="hf_nobody", tags=["poems"]).oid == COMMIT
    model.push_to_hub(repo, token="hf_nobody", revision="second")
    card = Path(HfApi().hf_hub_download(repo, "README.md", local_dir=folder / "theirs"))
    card.write_text(card.read_text().replace("Not specified yet", "MIT, said by me"))
    HfApi(token="hf_nobody").upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id=repo)
    model.push_to_hub(repo, token="hf_nobody")
    theirs = rw.PeftModel.from_pretrained(block(), repo).eval()
    assert torch.equal(model(X), theirs(X))
    assert "transformers" not in sys.modules, "the hub is for models of any library"


if __name__ == "__main__":
    _push_and_load()
