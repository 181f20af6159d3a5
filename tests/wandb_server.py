"""A W&B server on the loopback address: enough for `wandb.Api().artifact(...)`, its manifest and its files.

The SDK is pointed here by `WANDB_BASE_URL`. The queries are those that SDK 0.31 sends.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote, unquote


API_KEY = "a" * 20 + "b" * 20
READABLE = "guild/moe"
TIME = "2026-01-01T00:00:00"


@dataclass
class Artifact:
    """`files`: path -> bytes. `entries` are put into the manifest over what the files give, as a hostile
    server might.

    Of what the manifest promises, `served` is sent with other bytes, and `lost` not at all.
    """

    files: dict[str, bytes]
    type: str = "model"
    entries: dict[str, dict] = field(default_factory=dict)
    served: dict[str, bytes] = field(default_factory=dict)
    lost: tuple[str, ...] = ()

    def manifest(self) -> dict:
        contents = {path: {"digest": md5(data), "size": len(data)} for path, data in self.files.items()}
        contents.update(self.entries)
        policy = {"storageLayout": "V2", "storageRegion": "default"}
        return {
            "version": 1,
            "storagePolicy": "wandb-storage-policy-v1",
            "storagePolicyConfig": policy,
            "contents": contents,
        }

    def digest(self) -> str:
        return hashlib.md5(json.dumps(self.manifest(), sort_keys=True).encode()).hexdigest()


def md5(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data).digest()).decode()


class WandbServer:
    """`with WandbServer() as server:`; `server.artifacts["guild/moe/name:v0"] = Artifact(...)`.

    `server.status`, if set, answers every question instead: 403, 500. What was fetched is in
    `server.fetched`.
    """

    def __init__(self):
        self.artifacts: dict[str, Artifact] = {}
        self.fetched: list[str] = []
        self.status: int | None = None

    def __enter__(self) -> "WandbServer":
        server = self

        class Handler(_Handler):
            pass

        Handler.wandb = server
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self.http.shutdown()
        self.http.server_close()

    def environment(self, home, api_key: str | None = API_KEY) -> dict[str, str]:
        variables = {"WANDB_BASE_URL": self.url, "HOME": str(home), "WANDB_CACHE_DIR": f"{home}/cache"}
        variables |= {"WANDB_DIR": str(home), "WANDB_DATA_DIR": f"{home}/data", "NETRC": f"{home}/.netrc"}
        return {**variables, **({"WANDB_API_KEY": api_key} if api_key else {})}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wandb: WandbServer

    def log_message(self, *arguments) -> None:
        pass

    def _answer(self, content, status: int = 200) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        if not self.path.startswith("/storage/"):
            return self._answer(b"no such page", 404)
        key, path = (
            unquote(part) for part in self.path.split("?")[0].removeprefix("/storage/").split("/", 1)
        )
        artifact = self.wandb.artifacts[key]
        if path == "manifest":
            return self._answer(artifact.manifest())
        path = path.removeprefix("files/")
        self.wandb.fetched.append(path)
        if path in artifact.lost:
            return self._answer(b"gone", 404)
        self._answer(artifact.served.get(path, artifact.files.get(path, b"")))

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path != "/graphql":
            return self._answer(b"")  # the SDK's own counters
        expected = "Basic " + base64.b64encode(f"api:{API_KEY}".encode()).decode()
        status = self.wandb.status
        if status is None and self.headers.get("Authorization") != expected:
            status = 401
        if status is not None:
            return self._answer({"errors": [{"message": f"refused with {status}"}]}, status)
        asked = json.loads(body)
        name = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"]).group(1)
        variables = asked.get("variables") or {}
        answer = getattr(self, name, None)
        if answer is None:
            return self._answer({"errors": [{"message": f"unknown query {name}"}]}, 400)
        self._answer({"data": answer(**variables)})

    # Queries, by their names

    def Viewer(self, **_):
        viewer = {"id": "VXNlcjox", "entity": "guild", "username": "ada", "email": "", "flags": "{}"}
        return {"viewer": {**viewer, "teams": {"edges": [{"node": {"name": "guild"}}]}}}

    def GetDefaultEntity(self, **_):
        return {"viewer": {"id": "VXNlcjox", "entity": "guild"}}

    def ServerFeaturesQuery(self, **_):
        return {"serverInfo": {"features": []}}

    def ArtifactMembershipByName(self, entity, project, name, **_):
        if f"{entity}/{project}" != READABLE:
            return {"project": None}
        key = f"{READABLE}/{name}".replace(":latest", ":v0")
        artifact = self.wandb.artifacts.get(key)
        if artifact is None:
            return {"project": {"artifactCollectionMembership": None}}
        collection_name = name.split(":")[0]
        where = {
            "id": "UHJvamVjdDox",
            "internalId": "UHJvamVjdDox",
            "name": project,
            "entity": {"name": entity},
        }
        collection = {"__typename": "ArtifactSequence", "name": collection_name, "project": where}
        fragment = {
            "__typename": "Artifact",
            "id": base64.b64encode(key.encode()).decode(),
            "artifactSequence": collection,
            "versionIndex": 0,
            "artifactType": {"name": artifact.type},
            "description": None,
            "metadata": "{}",
            "ttlDurationSeconds": -2,
            "ttlIsInherited": True,
            "tags": [],
            "historyStep": None,
            "state": "COMMITTED",
            "size": sum(map(len, artifact.files.values())),
            "digest": artifact.digest(),
            "commitHash": "c0ffee",
            "fileCount": len(artifact.files),
            "createdAt": TIME,
            "updatedAt": None,
        }
        membership = {
            "__typename": "ArtifactCollectionMembership",
            "id": "TWVtYmVyOjE=",
            "versionIndex": 0,
            "createdAt": TIME,
            "aliases": [{"__typename": "ArtifactAlias", "id": "QWxpYXM6MQ==", "alias": "latest"}],
            "artifactCollection": collection,
            "artifact": fragment,
        }
        return {"project": {"artifactCollectionMembership": membership}}

    def FetchArtifactManifest(self, id, **_):
        key = base64.b64decode(id).decode()
        return {"artifact": {"currentManifest": {"file": {"directUrl": self._url(key, "manifest")}}}}

    def GetArtifactMembershipFileUrls(self, entity, project, collection, alias, **_):
        key = f"{entity}/{project}/{collection}:{alias}"
        manifest = self.wandb.artifacts[key].manifest()["contents"]
        nodes = [
            {"__typename": "File", "name": path, "directUrl": self._url(key, f"files/{path}")}
            for path in manifest
        ]
        membership = {
            "files": {
                "pageInfo": {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False},
                "edges": [{"node": node} for node in nodes],
            }
        }
        return {
            "project": {
                "artifactCollection": {"__typename": "ArtifactSequence", "artifactMembership": membership}
            }
        }

    def _url(self, key: str, path: str) -> str:
        return (
            f"{self.wandb.url}/storage/{quote(key, safe='')}/{quote(path, safe='')}?signature=for_its_bearer"
        )
