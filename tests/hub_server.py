"""A Hub on the loopback address: enough of the Hub's HTTP protocol for an unmodified `huggingface_hub`.

Repos, branches, commits, large files, tokens. Facts about the protocol are
those of https://huggingface.co/docs/hub/api and of what the client sends. The client is pointed here by
`HF_ENDPOINT`.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


@dataclass
class Commit:
    """One state of a repo: a file's path -> its bytes."""

    sha: str
    message: str
    files: dict[str, bytes]


@dataclass
class Repo:
    private: bool = False
    gated: bool = False  # it can be seen, and its files are for those who own it
    branches: dict[str, Commit] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    tags: dict[str, Commit] = field(default_factory=dict)

    def commit(self, branch: str, message: str, files: dict[str, bytes]) -> Commit:
        text = repr((len(self.commits), message, sorted((path, hash(data)) for path, data in files.items())))
        commit = Commit(hashlib.sha1(text.encode()).hexdigest(), message, files)
        self.branches[branch] = self.commits[commit.sha] = commit
        return commit

    def at(self, revision: str) -> Commit | None:
        return self.branches.get(revision) or self.tags.get(revision) or self.commits.get(revision)


class Refused(Exception):
    """An answer that is an error, with the headers by which the client tells one from another."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


def is_large(path: str, size: int) -> bool:
    """What the real Hub's default `.gitattributes` sends to large-file storage."""
    return path.endswith((".safetensors", ".bin", ".pt", ".pth", ".zip")) or size > 10 * 1024**2


TOKENS = {"hf_write": ("ada", "write"), "hf_read": ("ada", "read"), "hf_other": ("eve", "write")}
ORGANIZATIONS = {"ada": ["guild"], "eve": []}


class Hub:
    """`with Hub() as hub:` serves at `hub.endpoint`; state is in `hub.repos`, what was asked in
    `hub.requests`.

    Tokens: `hf_write` belongs to the user "ada", who may write to "ada" and "guild"; `hf_read` to her,
    without writing; `hf_other` to the user "eve".
    """

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.RLock()

    def __enter__(self) -> "Hub":
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home, token: str | None = None) -> dict[str, str]:
        """Variables that point a client here. Xet storage is a service of its own; large files go by Git LFS
        here."""
        variables = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        if token is not None:
            variables["HF_TOKEN"] = token
        return variables

    def downloads(self) -> list[str]:
        """Paths of the files whose content was sent, in order."""
        return [
            path.split("/resolve/")[1].split("/", 1)[1]
            for verb, path in self.requests
            if verb == "GET" and "/resolve/" in path
        ]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *arguments) -> None:
        pass

    def _serve(self) -> None:
        address = urlsplit(self.path)
        path, query = unquote(address.path), parse_qs(address.query)
        length = int(self.headers.get("Content-Length") or 0)
        body = (
            self._chunks() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(length)
        )
        with self.hub.lock:
            self.hub.requests.append((self.command, path))
            try:
                for verbs, pattern, handle in ROUTES:
                    match = re.fullmatch(pattern, path)
                    if match and self.command in verbs:
                        return self._answer(*handle(self, body, query, **match.groupdict()))
                raise Refused(404, f"no such page: {self.command} {path}")
            except Refused as refusal:
                headers = {"X-Error-Message": refusal.message}
                if refusal.code:
                    headers["X-Error-Code"] = refusal.code
                self._answer({"error": refusal.message}, refusal.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, content, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # Who asks, and for what

    def user(self) -> tuple[str, str] | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if not token:
            return None
        if token not in TOKENS:
            raise Refused(401, "Invalid credentials in Authorization header")
        return TOKENS[token]

    def owns(self, repo_id: str) -> bool:
        user = self.user()
        return user is not None and repo_id.split("/")[0] in (user[0], *ORGANIZATIONS[user[0]])

    def readable(self, repo_id: str) -> Repo:
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and not self.owns(repo_id)):
            raise Refused(404 if self.user() else 401, "Repository not found", "RepoNotFound")
        return repo

    def writable(self, repo_id: str) -> Repo:
        if self.user() is None:
            raise Refused(401, "Invalid username or password.")
        repo = self.readable(repo_id)
        if self.user()[1] != "write" or not self.owns(repo_id):
            raise Refused(403, f"Forbidden: pass `create_pr=1` or use a token with write access to {repo_id}")
        return repo

    def commit_of(self, repo_id: str, revision: str) -> Commit:
        commit = self.readable(repo_id).at(revision)
        if commit is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # Pages

    def whoami(self, body, query):
        if self.user() is None:
            raise Refused(401, "Invalid username or password.")
        name, role = self.user()
        organizations = [{"name": organization, "type": "org"} for organization in ORGANIZATIONS[name]]
        return (
            {"type": "user", "name": name, "orgs": organizations, "auth": {"accessToken": {"role": role}}},
        )

    def create_repo(self, body, query):
        if self.user() is None:
            raise Refused(401, "Invalid username or password.")
        asked = json.loads(body)
        repo_id = f"{asked.get('organization') or self.user()[0]}/{asked['name']}"
        if self.user()[1] != "write" or not self.owns(repo_id):
            raise Refused(403, f"You don't have the rights to create a model under the namespace {repo_id!r}")
        answer = {"url": f"{self.hub.endpoint}/{repo_id}", "id": repo_id, "name": repo_id}
        if repo_id in self.hub.repos:
            return {**answer, "error": "You already created this model repo"}, 409
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        self.hub.repos[repo_id] = Repo(private=private)
        self.hub.repos[repo_id].commit(
            "main", "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"}
        )
        return (answer,)

    def validate_yaml(self, body, query):
        front = re.match(r"---\s*\n(.*?)\n---\s*\n", json.loads(body)["content"], re.DOTALL)
        try:
            metadata = yaml.safe_load(front.group(1)) if front else {}
        except yaml.YAMLError as error:
            return {"errors": [{"message": str(error)}], "warnings": []}, 400
        if not isinstance(metadata, dict):
            return {"errors": [{"message": "metadata must be a mapping"}], "warnings": []}, 400
        return ({"errors": [], "warnings": []},)

    def preupload(self, body, query, repo_id, revision):
        self.writable(repo_id)
        self.commit_of(repo_id, revision)
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if is_large(file["path"], file["size"]) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        return ({"files": files},)

    def large_batch(self, body, query, repo_id):
        self.writable(repo_id)
        objects = []
        for asked in json.loads(body)["objects"]:
            entry = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.large:
                entry["actions"] = {
                    "upload": {"href": f"{self.hub.endpoint}/large/{asked['oid']}", "header": {}}
                }
            objects.append(entry)
        return ({"transfer": "basic", "objects": objects},)

    def large_upload(self, body, query, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, "content and oid differ")
        self.hub.large[oid] = body
        return (b"",)

    def make_commit(self, body, query, repo_id, revision):
        repo = self.writable(repo_id)
        before = self.commit_of(repo_id, revision)
        files, message = dict(before.files), ""
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            match entry["key"]:
                case "header":
                    message = value["summary"]
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.hub.large[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
                case "deletedFolder":
                    folder = value["path"].rstrip("/") + "/"
                    files = {path: data for path, data in files.items() if not path.startswith(folder)}
        commit = repo.commit(revision, message, files)
        url = f"{self.hub.endpoint}/{repo_id}/commit/{commit.sha}"
        return ({"success": True, "commitOid": commit.sha, "commitUrl": url, "hookOutput": ""},)

    def create_branch(self, body, query, repo_id, revision):
        repo = self.writable(repo_id)
        if revision in repo.branches:
            raise Refused(409, f"Reference already exists: {revision}")
        repo.branches[revision] = self.commit_of(
            repo_id, json.loads(body or b"{}").get("startingPoint", "main")
        )
        return ({},)

    def settings(self, body, query, repo_id):
        asked = json.loads(body)
        self.writable(repo_id).private = bool(asked.get("private")) or asked.get("visibility") == "private"
        return ({"private": self.hub.repos[repo_id].private},)

    def info(self, body, query, repo_id, revision="main"):
        commit = self.commit_of(repo_id, revision)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        private = self.hub.repos[repo_id].private
        names = {"_id": repo_id, "id": repo_id, "modelId": repo_id, "author": repo_id.split("/")[0]}
        return (
            {
                **names,
                "sha": commit.sha,
                "private": private,
                "siblings": siblings,
                "tags": [],
                "gated": False,
            },
        )

    def refs(self, body, query, repo_id):
        repo = self.readable(repo_id)
        branches, tags = (
            [
                {"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": commit.sha}
                for name, commit in found.items()
            ]
            for kind, found in (("heads", repo.branches), ("tags", repo.tags))
        )
        return ({"branches": branches, "converts": [], "tags": tags},)

    def tree(self, body, query, repo_id, revision, folder=""):
        commit = self.commit_of(repo_id, revision)
        prefix = f"{folder}/" if folder else ""
        inside = {path: data for path, data in commit.files.items() if path.startswith(prefix)}
        if folder and not inside:
            raise Refused(404, f"{folder} does not exist", "EntryNotFound")
        recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries: dict[str, dict] = {}
        for path, data in sorted(inside.items()):
            parts = path.removeprefix(prefix).split("/")
            for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                name = prefix + "/".join(parts[:depth])
                entries[name] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": name}
            if recursive or len(parts) == 1:
                entries[path] = file_entry(path, data)
        return (list(entries.values()),)

    def paths_info(self, body, query, repo_id, revision):
        commit = self.commit_of(repo_id, revision)
        is_json = "json" in self.headers.get("Content-Type", "")
        paths = json.loads(body)["paths"] if is_json else parse_qs(body.decode())["paths"]
        return ([file_entry(path, commit.files[path]) for path in paths if path in commit.files],)

    def file(self, body, query, repo_id, revision, path):
        commit = self.commit_of(repo_id, revision)
        if self.readable(repo_id).gated and not self.owns(repo_id):
            raise Refused(
                403 if self.user() else 401, f"Access to model {repo_id} is restricted", "GatedRepo"
            )
        if path not in commit.files:
            raise Refused(404, "Entry not found", "EntryNotFound")
        data = commit.files[path]
        entry = file_entry(path, data)
        headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{entry["oid"]}"', "Accept-Ranges": "bytes"}
        if "lfs" in entry:
            headers |= {"X-Linked-ETag": f'"{entry["lfs"]["oid"]}"', "X-Linked-Size": str(len(data))}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked is None:
            return data, 200, headers
        first, last = int(asked[1]), min(int(asked[2] or len(data) - 1), len(data) - 1)
        return data[first : last + 1], 206, {**headers, "Content-Range": f"bytes {first}-{last}/{len(data)}"}


def file_entry(path: str, data: bytes) -> dict:
    git_oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    entry = {"type": "file", "oid": git_oid, "size": len(data), "path": path}
    if is_large(path, len(data)):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return entry


REPO = r"/api/models/(?P<repo_id>[^/]+/[^/]+)"
ROUTES = [
    ({"GET"}, r"/api/whoami-v2", _Handler.whoami),
    ({"POST"}, r"/api/repos/create", _Handler.create_repo),
    ({"POST"}, r"/api/validate-yaml", _Handler.validate_yaml),
    ({"POST"}, REPO + r"/preupload/(?P<revision>.+)", _Handler.preupload),
    ({"POST"}, REPO + r"/commit/(?P<revision>.+)", _Handler.make_commit),
    ({"POST"}, REPO + r"/branch/(?P<revision>.+)", _Handler.create_branch),
    ({"PUT"}, REPO + r"/settings", _Handler.settings),
    ({"GET"}, REPO + r"/revision/(?P<revision>.+)", _Handler.info),
    ({"GET"}, REPO + r"/refs", _Handler.refs),
    ({"GET"}, REPO + r"/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", _Handler.tree),
    ({"POST"}, REPO + r"/paths-info/(?P<revision>.+)", _Handler.paths_info),
    ({"GET"}, REPO, _Handler.info),
    ({"POST"}, r"/(?P<repo_id>[^/]+/[^/]+)\.git/info/lfs/objects/batch", _Handler.large_batch),
    ({"PUT"}, r"/large/(?P<oid>[0-9a-f]{64})", _Handler.large_upload),
    ({"GET", "HEAD"}, r"/(?P<repo_id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.file),
]
