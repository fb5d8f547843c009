"""
A Hub of our own: what `huggingface_hub` asks for when it makes, fills, lists and reads repositories, over real HTTP.

Repositories live in memory as histories of snapshots, contents in files named by their sha256. Tokens decide who may do what, as on the
real one: a private repository does not exist for those who may not read it, and a token that may not write is told so.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

OWNER = "tester"
WRITE, READ, STRANGER = "hf_write", "hf_read", "hf_stranger"
#: What a token may do; `STRANGER` may write, but has no part in the owner's private repositories.
TOKENS = {WRITE: (OWNER, "write"), READ: (OWNER, "read"), STRANGER: ("stranger", "write")}

KIND, REPO, REV = r"(?P<kind>models|datasets|spaces)", r"(?P<repo>[\w.-]+/[\w.-]+)", r"(?P<rev>[^/]+)"
PREFIX = r"(?P<prefix>datasets/|spaces/)?"


class Refused(Exception):
    def __init__(self, status: int, code: str | None, message: str, **headers: str):
        super().__init__(message)
        self.status, self.headers = status, {"X-Error-Message": message, **headers}
        if code:
            self.headers["X-Error-Code"] = code


@dataclass
class File:
    oid: str
    size: int
    lfs: bool


@dataclass
class Commit:
    oid: str
    title: str
    files: dict[str, File]


@dataclass
class Repository:
    private: bool = False
    commits: list[Commit] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)

    def add(self, ref: str, title: str, files: dict[str, File]) -> str:
        listing = sorted((path, file.oid) for path, file in files.items())
        oid = hashlib.sha1(json.dumps([len(self.commits), title, listing]).encode()).hexdigest()
        self.commits.append(Commit(oid, title, files))
        self.refs[ref] = oid
        return oid

    def at(self, revision: str) -> Commit:
        oid = self.refs.get(revision, revision)
        for commit in self.commits:
            if commit.oid == oid:
                return commit
        raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")


class Hub:
    """
    The server's state, for tests to look into.

    Attributes:
        calls: how often each route was asked, by the name of its function below.
        fail: statuses that the next requests of a route are answered with instead.
        unknown: requests that there is no route for.
        endpoint: the server's address.
    """

    endpoint: str

    def __init__(self, root: Path):
        self.blobs = root / "blobs"
        self.blobs.mkdir(parents=True)
        self.repos: dict[tuple[str, str], Repository] = {}
        self.calls: Counter[str] = Counter()
        self.fail: dict[str, list[int]] = {}
        self.unknown: list[str] = []
        self.lock = threading.Lock()

    def put(self, data: bytes) -> str:
        oid = hashlib.sha256(data).hexdigest()
        (self.blobs / oid).write_bytes(data)
        return oid

    def files(self, repo: str, revision: str = "main", kind: str = "models") -> dict[str, File]:
        return self.repos[kind, repo].at(revision).files

    def text(self, repo: str, path: str) -> str:
        return (self.blobs / self.files(repo)[path].oid).read_text(encoding="utf-8")

    def commit_files(self, repo: str, changes: dict[str, bytes | str | None], revision: str = "main") -> str:
        """Commits past every client's checks, as an attacker or an older library would; `None` deletes."""
        repository = self.repos.setdefault(("models", repo), Repository())
        files = dict(repository.at(revision).files) if revision in repository.refs else {}
        for path, content in changes.items():
            if content is None:
                del files[path]
            else:
                data = content.encode() if isinstance(content, str) else content
                files[path] = File(self.put(data), len(data), lfs=False)
        return repository.add(revision, "by hand", files)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args): ...

    # -- who asks ------------------------------------------------------------------------------
    def user(self) -> tuple[str | None, str]:
        bearer = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not bearer:
            return None, "none"
        if bearer not in TOKENS:
            raise Refused(401, None, "Invalid credentials in Authorization header")
        return TOKENS[bearer]

    def repository(self, kind: str, repo: str, write: bool = False) -> Repository:
        name, _ = self.user()
        repository = self.hub.repos.get((kind, repo))
        if repository is None or (repository.private and name != repo.split("/")[0]):
            raise Refused(404 if name else 401, "RepoNotFound", "Repository not found")
        if write:
            self.may_write(repo)
        return repository

    def may_write(self, repo: str) -> None:
        name, role = self.user()
        if name is None:
            raise Refused(401, None, "Invalid username or password.")
        if role != "write" or name != repo.split("/")[0]:
            raise Refused(403, None, f"you don't have the rights to write to {repo}")

    # -- routes --------------------------------------------------------------------------------
    def whoami(self):
        name, role = self.user()
        if name is None:
            raise Refused(401, None, "Invalid username or password.")
        access = {"type": "access_token", "accessToken": {"role": role}}
        return {"type": "user", "name": name, "fullname": name, "orgs": [], "auth": access}

    def validate_yaml(self):
        return {"errors": [], "warnings": []}

    def create_repo(self):
        body, (name, _) = self.json(), self.user()
        kind, repo = body.get("type", "model") + "s", f"{body.get('organization') or name}/{body['name']}"
        self.may_write(repo)
        url = f"{self.base}/{'' if kind == 'models' else kind + '/'}{repo}"
        if (kind, repo) in self.hub.repos:
            return {"error": "You already created this repo", "url": url}, 409
        self.hub.repos[kind, repo] = Repository(private=body.get("visibility") == "private")
        self.hub.repos[kind, repo].add("main", "initial commit", {})
        return {"url": url, "name": repo}

    def info(self, kind, repo, rev="main"):
        repository = self.repository(kind, repo)
        commit = repository.at(unquote(rev))
        siblings = [{"rfilename": path, "size": file.size} for path, file in commit.files.items()]
        counts = {"tags": [], "downloads": 0, "likes": 0}
        return {"id": repo, "sha": commit.oid, "private": repository.private, "siblings": siblings, **counts}

    def refs(self, kind, repo):
        refs = self.repository(kind, repo).refs.items()
        branches = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid} for name, oid in refs]
        return {"branches": branches, "converts": [], "tags": []}

    def commits(self, kind, repo, rev):
        shared = {"message": "", "date": "2026-01-01T00:00:00.000Z", "authors": [{"user": OWNER}]}
        return [
            {"id": commit.oid, "title": commit.title, **shared}
            for commit in reversed(self.repository(kind, repo).commits)
        ]

    def tree(self, kind, repo, rev, path=""):
        folder = unquote(path).strip("/")
        files = self.repository(kind, repo).at(unquote(rev)).files
        inside = {name: file for name, file in files.items() if not folder or name.startswith(folder + "/")}
        if folder and not inside:
            raise Refused(404, "EntryNotFound", f"Entry not found: {folder}")
        depth = folder.count("/") + bool(folder)
        folders = {"/".join(name.split("/")[: n + 1]) for name in inside for n in range(depth, name.count("/"))}
        rows = [{"type": "directory", "path": name, "size": 0, "oid": "0" * 40} for name in folders]
        rows += [describe(name, file) for name, file in inside.items()]
        recursive = "recursive=true" in self.path.lower()
        return sorted((row for row in rows if recursive or row["path"].count("/") == depth), key=lambda r: r["path"])

    def paths_info(self, kind, repo, rev):
        files = self.repository(kind, repo).at(unquote(rev)).files
        form = "urlencoded" in self.headers["Content-Type"]
        wanted = parse_qs(self.payload.decode())["paths"] if form else self.json()["paths"]
        return [describe(path, files[path]) for path in wanted if path in files]

    def preupload(self, kind, repo, rev):
        known = self.repository(kind, repo, write=True).at(unquote(rev)).files
        answer = []
        for file in self.json()["files"]:
            oid = known[file["path"]].oid if file["path"] in known else None
            binary = file["path"].endswith(".safetensors") or b"\0" in base64.b64decode(file["sample"])
            mode = "lfs" if binary else "regular"
            answer.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answer}

    def lfs_batch(self, prefix, repo):
        self.repository((prefix or "models/").rstrip("/"), repo, write=True)
        rows = []
        for asked in self.json()["objects"]:
            row = {"oid": asked["oid"], "size": asked["size"]}
            if not (self.hub.blobs / asked["oid"]).exists():  # what is here needs no second upload
                upload, verify = f"{self.base}/lfs/{asked['oid']}", f"{self.base}/lfs-verify"
                row["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
            rows.append(row)
        return {"transfer": "basic", "objects": rows}

    def lfs_put(self, oid):
        if self.hub.put(self.payload) != oid:
            raise Refused(400, "BadDigest", "content does not match its oid")
        return {}

    def lfs_verify(self):
        body = self.json()
        if (self.hub.blobs / body["oid"]).stat().st_size != body["size"]:
            raise Refused(400, "BadSize", "size mismatch")
        return {}

    def commit(self, kind, repo, rev):
        repository = self.repository(kind, repo, write=True)
        files, title = dict(repository.at(unquote(rev)).files), ""
        for line in self.payload.splitlines():
            key, value = (item := json.loads(line))["key"], item["value"]
            if key == "header":
                title = value["summary"]
            elif key == "file":
                data = base64.b64decode(value["content"])
                files[value["path"]] = File(self.hub.put(data), len(data), lfs=False)
            elif key == "lfsFile":
                files[value["path"]] = File(value["oid"], (self.hub.blobs / value["oid"]).stat().st_size, lfs=True)
            else:  # deletedFile, deletedFolder
                gone = value["path"].rstrip("/")
                files = {p: f for p, f in files.items() if p != gone and not p.startswith(gone + "/")}
        oid = repository.add(unquote(rev), title, files)
        url = f"{self.base}/{repo}/commit/{oid}"
        return {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""}

    def branch(self, kind, repo, rev):
        repository = self.repository(kind, repo, write=True)
        if unquote(rev) in repository.refs:
            return {"error": "Reference already exists"}, 409
        repository.refs[unquote(rev)] = repository.at(self.json().get("startingPoint", "main")).oid
        return {}

    def resolve(self, prefix, repo, rev, path):
        commit = self.repository((prefix or "models/").rstrip("/"), repo).at(unquote(rev))
        file = commit.files.get(unquote(path))
        if file is None:
            # With the commit, the client remembers that it lacks this file.
            raise Refused(404, "EntryNotFound", f"Entry not found: {path}", **{"X-Repo-Commit": commit.oid})
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{file.oid if file.lfs else file.oid[:40]}"'}
        if file.lfs:
            headers |= {"X-Linked-Etag": f'"{file.oid}"', "X-Linked-Size": str(file.size)}
        self.send_file(self.hub.blobs / file.oid, headers)

    ROUTES = [
        ("GET", r"/api/whoami-v2", whoami),
        ("POST", r"/api/validate-yaml", validate_yaml),
        ("POST", r"/api/repos/create", create_repo),
        ("POST", rf"/api/{KIND}/{REPO}/preupload/{REV}", preupload),
        ("POST", rf"/api/{KIND}/{REPO}/commit/{REV}", commit),
        ("POST", rf"/api/{KIND}/{REPO}/paths-info/{REV}", paths_info),
        ("POST", rf"/api/{KIND}/{REPO}/branch/{REV}", branch),
        ("GET", rf"/api/{KIND}/{REPO}/tree/{REV}(?P<path>/.*)?", tree),
        ("GET", rf"/api/{KIND}/{REPO}/commits/{REV}", commits),
        ("GET", rf"/api/{KIND}/{REPO}/refs", refs),
        ("GET", rf"/api/{KIND}/{REPO}(/revision/{REV})?", info),
        ("POST", rf"/{PREFIX}{REPO}\.git/info/lfs/objects/batch", lfs_batch),
        ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", lfs_put),
        ("POST", r"/lfs-verify", lfs_verify),
        ("GET", rf"/{PREFIX}{REPO}/resolve/{REV}/(?P<path>.+)", resolve),
    ]

    # -- plumbing ------------------------------------------------------------------------------
    @property
    def base(self) -> str:
        return f"http://{self.headers['Host']}"

    def json(self):
        return json.loads(self.payload or b"{}")

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def dispatch(self) -> None:
        self.payload = self.read_body()  # always, or a kept-alive connection would read it as its next request
        try:
            with self.hub.lock:
                answer = self.answer()
            if answer is not None:
                body, status = answer if isinstance(answer, tuple) else (answer, 200)
                self.reply(status, body)
        except Refused as refused:
            self.reply(refused.status, {"error": str(refused)}, refused.headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = dispatch

    def answer(self):
        path, method = urlsplit(self.path).path, "GET" if self.command == "HEAD" else self.command
        for verb, pattern, function in self.ROUTES:
            if verb == method and (match := re.fullmatch(pattern, path)):
                name = function.__name__
                self.hub.calls[name] += 1
                if self.hub.fail.get(name):
                    raise Refused(self.hub.fail[name].pop(0), None, "the server is not well")
                groups = {
                    key: value for key, value in match.groupdict().items() if value is not None or key == "prefix"
                }
                return function(self, **groups)
        self.hub.unknown.append(f"{self.command} {path}")
        raise Refused(404, None, f"no route for {self.command} {path}")

    def reply(self, status: int, body, headers: dict[str, str] | None = None) -> None:
        payload = json.dumps(body).encode()
        self.start(
            status, {"Content-Type": "application/json", "Content-Length": str(len(payload)), **(headers or {})}
        )
        if self.command != "HEAD":
            self.wfile.write(payload)

    def start(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def send_file(self, path: Path, headers: dict[str, str]) -> None:
        data = path.read_bytes()
        first, last, status = 0, len(data) - 1, 200
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last, status = int(match[1]), min(int(match[2] or last), last), 206
            headers = {**headers, "Content-Range": f"bytes {first}-{last}/{len(data)}"}
        length = {"Content-Length": str(last - first + 1), "Content-Type": "application/octet-stream"}
        self.start(status, {**length, "Accept-Ranges": "bytes", **headers})
        if self.command != "HEAD":
            self.wfile.write(data[first : last + 1])


def describe(path: str, file: File) -> dict:
    row = {"type": "file", "path": path, "size": file.size, "oid": file.oid[:40]}
    return row | ({"lfs": {"oid": file.oid, "size": file.size, "pointerSize": 130}} if file.lfs else {})


@contextlib.contextmanager
def serve(root: Path):
    """Runs the server in a thread of this process; yields its state."""
    hub = Hub(root)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
