"""
A Hugging Face Hub on this machine, for tests: a server of model repositories that the real `huggingface_hub` talks to.

It speaks the part of the Hub's protocol that `ROUTES` lists: repositories are created; a commit is prepared (which
files are large, which have changed), sent, and makes a new revision of a branch; large files go the way of git LFS,
one PUT for each; and every revision can be listed and downloaded. It checks tokens and hashes, and fails when it is
told to. It knows no Xet (set `HF_HUB_DISABLE_XET=1`), no uploads in parts, no deletions and no datasets.
"""

import base64
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock
from typing import NamedTuple
from urllib.parse import unquote, urlsplit


TOKEN = "hf_secret"  # the one that may read and write everything; others read what is public
LOST = "lost"  # a failure of which the client sees a closed connection: its request was granted, the answer got lost

ROUTES = {
    "create": "POST /api/repos/create",
    "branch": "POST /api/models/(?P<repo>.+)/branch/(?P<name>.+)",
    "validate": "POST /api/validate-yaml",
    "preupload": "POST /api/models/(?P<repo>.+)/preupload/(?P<revision>.+)",
    "batch": r"POST /(?P<repo>.+)\.git/info/lfs/objects/batch",
    "put": "PUT /objects/(?P<oid>.+)",
    "verify": "POST /objects/verify",
    "commit": "POST /api/models/(?P<repo>.+)/commit/(?P<revision>.+)",
    "tree": "GET /api/models/(?P<repo>.+)/tree/(?P<revision>[^/]+)",
    "info": "GET /api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<revision>.+))?",
    "resolve": "(HEAD|GET) /(?P<repo>.+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)",
}


class Commit(NamedTuple):
    oid: str
    message: str
    files: dict[str, bytes]  # all that the repository holds from then on


class Repository(NamedTuple):
    private: bool
    branches: dict[str, list[Commit]]  # of which each begins with the empty commit that made the repository

    @property
    def commits(self):
        return self.branches["main"]


class Refusal(Exception):
    def __init__(self, status, message, code=None, **fields):
        super().__init__(message)
        self.status, self.headers = status, {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self.answer = {"error": message, **fields}


def is_large(path):
    return path.endswith((".safetensors", ".png"))


def object_id(path, content):
    """What tells whether a file has changed: of a large one its SHA-256, of a text the hash that git gives it."""
    if is_large(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub(ThreadingHTTPServer):
    """
    Attributes:
        repositories (`dict[str, Repository]`): by name, such as "me/fox".
        requests (`list[tuple[str, str]]`): all that were made: the kind and the token, `None` without one.
        failures (`dict[str, Iterator]`): by the kind of request, what becomes of the next ones: an HTTP status such as
            503, `LOST`, or `None` for no failure. When it is used up, nothing fails any more.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), HubRequest)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories, self.requests, self.failures = {}, [], {}
        self.objects = {}  # large files by their SHA-256
        self.lock = Lock()

    def count(self, kind):
        return [asked for asked, _ in self.requests].count(kind)

    def files(self, repo="me/fox", branch="main"):
        return self.repositories[repo].branches[branch][-1].files

    def messages(self, repo="me/fox", branch="main"):
        """Of all commits but the one that made the repository."""
        return [commit.message for commit in self.repositories[repo].branches[branch][1:]]

    def find(self, repo, revision, token):
        """The commit that a revision means."""
        found = self.repositories.get(repo)
        if found is None or (found.private and token != TOKEN):
            raise Refusal(401, "Repository not found", "RepoNotFound")
        commits = {commit.oid: commit for branch in found.branches.values() for commit in branch}
        commits |= {name: branch[-1] for name, branch in found.branches.items()}
        commits[None] = commits["main"]
        if revision not in commits:
            raise Refusal(404, "Invalid rev id", "RevisionNotFound")
        return commits[revision]

    # One method for each kind of request. It returns what is sent as JSON.

    def create(self, token, body):
        asked = json.loads(body)
        repo = f"{asked['organization'] or 'me'}/{asked['name']}"
        url = f"{self.url}/{repo}"
        if repo in self.repositories:
            raise Refusal(409, "You already created this model repo", url=url)
        main = [Commit("0" * 40, "created", {})]
        self.repositories[repo] = Repository(asked.get("visibility") == "private", {"main": main})
        return {"url": url}

    def branch(self, token, body, repo, name):
        branches = self.repositories[repo].branches
        if name in branches:
            raise Refusal(409, "Reference already exists")
        branches[name] = list(branches["main"])

    def validate(self, token, body):
        return {"errors": [], "warnings": []}

    def preupload(self, token, body, repo, revision):
        present, answer = self.find(repo, revision, token).files, []
        for path in [file["path"] for file in json.loads(body)["files"]]:
            known = {"oid": object_id(path, present[path])} if path in present else {}
            mode = "lfs" if is_large(path) else "regular"
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **known})
        return {"files": answer}

    def batch(self, token, body, repo):
        answer = json.loads(body)["objects"]
        for item in answer:
            if item["oid"] not in self.objects:
                put = {"href": f"{self.url}/objects/{item['oid']}"}
                item["actions"] = {"upload": put, "verify": {"href": f"{self.url}/objects/verify"}}
        return {"transfer": "basic", "objects": answer}

    def put(self, token, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, "The content is not that of the hash")
        self.objects[oid] = body

    def verify(self, token, body):
        if json.loads(body)["oid"] not in self.objects:
            raise Refusal(404, "The object is not there")

    def commit(self, token, body, repo, revision):
        header, *changes = [json.loads(line) for line in body.splitlines()]
        files = dict(self.find(repo, revision, token).files)
        for kind, file in [(change["key"], change["value"]) for change in changes]:
            if kind == "file":
                files[file["path"]] = base64.b64decode(file["content"])
            elif file["oid"] in self.objects:
                files[file["path"]] = self.objects[file["oid"]]
            else:
                raise Refusal(400, f"The content of {file['path']} was not uploaded")
        branches = self.repositories[repo].branches
        oids = {commit.oid for branch in branches.values() for commit in branch}
        commits = branches[revision]
        commits.append(Commit(f"{len(oids):040x}", header["value"]["summary"], files))
        return {"commitUrl": f"{self.url}/{repo}/commit/{commits[-1].oid}", "commitOid": commits[-1].oid}

    def info(self, token, body, repo, revision):
        commit = self.find(repo, revision, token)
        return {"id": repo, "sha": commit.oid, "siblings": [{"rfilename": path} for path in commit.files]}

    def tree(self, token, body, repo, revision):
        files = self.find(repo, revision, token).files
        return [
            {"type": "file", "path": path, "oid": object_id(path, content), "size": len(content)}
            for path, content in files.items()
        ]

    def resolve(self, token, body, repo, revision, path):
        """A file itself, not JSON, and its headers."""
        commit = self.find(repo, revision, token)
        if path not in commit.files:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        content = commit.files[path]
        return content, {"X-Repo-Commit": commit.oid, "ETag": f'"{object_id(path, content)}"'}


class HubRequest(BaseHTTPRequestHandler):
    def handle_request(self):
        hub, body = self.server, self.rfile.read(int(self.headers["Content-Length"] or 0))
        token = (self.headers["Authorization"] or "").removeprefix("Bearer ") or None
        asked = f"{self.command} {unquote(urlsplit(self.path).path)}"
        matches = {kind: match for kind, route in ROUTES.items() if (match := re.fullmatch(route, asked))}
        kind = next(iter(matches), None)
        with hub.lock:
            hub.requests.append((kind, token))
            failure = next(hub.failures.get(kind, iter(())), None)
            try:
                if kind is None:
                    raise Refusal(404, "This Hub does not know that")
                if failure not in (None, LOST):
                    raise Refusal(failure, "Storage is full" if failure == 403 else "Something went wrong")
                if self.command == "POST" and token != TOKEN:
                    raise Refusal(401, "Invalid username or password.")
                answer, headers = getattr(hub, kind)(token, body, **matches[kind].groupdict()), {}
                if kind == "resolve":
                    answer, headers = answer
                if failure != LOST:
                    self.send(200, answer, headers)
            except Refusal as refusal:
                self.send(refusal.status, refusal.answer, refusal.headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def send(self, status, answer, headers):
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args):
        pass
