"""
Serve a stand-in for the Hub on localhost, with the endpoints that the real `huggingface_hub` client needs to create,
write and read model repositories and Spaces. Supports private repositories, tokens, revisions and injected faults. All
data is in memory.
"""

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

LFS_SUFFIXES = (".safetensors", ".png", ".bin")


@dataclass
class Commit:
    """A commit with the contents of all files."""

    oid: str
    message: str
    files: dict[str, bytes]


@dataclass
class Repository:
    """A model repository: its commits, and the commit of each branch."""

    private: bool
    commits: list[Commit]
    branches: dict[str, str] = field(default_factory=dict)

    def at(self, revision: str) -> Commit | None:
        """Return the commit of a branch or with an oid; `None` if there is none."""
        oid = self.branches.get(revision, revision)
        return next((commit for commit in self.commits if commit.oid == oid), None)


@dataclass
class Fault:
    """An error status, or a closed connection (status 0), for the next `times` requests that match the pattern."""

    pattern: str
    status: int
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)


class Hub:
    """The state of the Hub, which tests set up and inspect."""

    def __init__(self):
        self.tokens = {"hf_writer": "write", "hf_reader": "read", "hf_fine": "fineGrained"}
        # The namespaces and repositories that the token hf_fine can write to
        self.writable: list[str] = []
        # By name; those of Spaces have the prefix "spaces/", as in addresses
        self.repositories: dict[str, Repository] = {}
        self.uploads: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []

    def create(self, repo_id: str, files: dict[str, bytes] | None = None, private: bool = False) -> Repository:
        """Create a repository with an initial commit."""
        repository = Repository(private, [])
        self.repositories[repo_id] = repository
        self.commit(repo_id, "initial commit", {".gitattributes": b"", **(files or {})})
        return repository

    def commit(self, repo_id: str, message: str, files: dict[str, bytes], branch: str = "main") -> Commit:
        """Replace the files of a branch in a new commit."""
        repository = self.repositories[repo_id]
        oid = hashlib.sha1(f"{repo_id}{len(repository.commits)}".encode()).hexdigest()
        commit = Commit(oid, message, files)
        repository.commits.append(commit)
        repository.branches[branch] = oid
        return commit

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Return the files of a repository at a revision, by name."""
        commit = self.repositories[repo_id].at(revision)
        assert commit is not None, revision
        return commit.files

    def environment(self, home: str, token: str | None = None) -> dict[str, str]:
        """Return environment variables for a process that uses only this Hub, with its own cache."""
        return {
            **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
            "HF_ENDPOINT": self.url,
            "HF_HOME": home,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            **({"HF_TOKEN": token} if token else {}),
        }

    @contextmanager
    def serve(self) -> Iterator["Hub"]:
        """Serve the Hub from a thread, at `self.url`."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        self.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


class Handler(BaseHTTPRequestHandler):
    """A handler of the Hub's endpoints in `ROUTES`."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def handle_any(self) -> None:
        """Record the request, then apply the first matching fault or call the endpoint."""
        url = urlparse(self.path)
        path = unquote(url.path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = self.read_chunks()
        line = f"{self.command} {path}"
        self.hub.requests.append(line)
        for fault in self.hub.faults:
            if fault.times > 0 and re.search(fault.pattern, line):
                fault.times -= 1
                if fault.status == 0:
                    self.close_connection = True
                    self.connection.close()
                    return
                return self.answer(fault.status, {"error": "fault"}, fault.headers)
        for pattern, handler in ROUTES:
            match = re.fullmatch(pattern, line)
            if match:
                arguments = match.groupdict()
                if arguments.pop("space", None):
                    arguments["repo_id"] = f"spaces/{arguments['repo_id']}"
                return handler(self, **arguments)
        self.answer(404, {"error": f"no such endpoint: {line}"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def read_chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline().strip(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def answer(self, status: int, content: object = None, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    @property
    def role(self) -> str | None:
        """The role of the request's token; `None` without a valid token."""
        return self.hub.tokens.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def can_write(self, repo_id: str) -> bool:
        """Return whether the request's token can write to a repository."""
        name = repo_id.removeprefix("spaces/")
        scoped = {name, name.split("/")[0]} & {*self.hub.writable}
        return self.role == "write" or (self.role == "fineGrained" and bool(scoped))

    def find(self, repo_id: str, revision: str = "main", write: bool = False) -> tuple[Repository, Commit] | None:
        """Return the repository and the commit, or answer with an error if the token does not give access to them."""
        if self.headers.get("Authorization") and self.role is None:
            return self.answer(401, {"error": "Invalid credentials"})
        if write and not self.can_write(repo_id):
            return self.answer(403, {"error": "Forbidden"})
        repository = self.hub.repositories.get(repo_id)
        if repository is None or (repository.private and self.role is None):
            return self.answer(404 if self.role else 401, {"error": "x"}, {"X-Error-Code": "RepoNotFound"})
        commit = repository.at(revision)
        if commit is None:
            return self.answer(404, {"error": "x"}, {"X-Error-Code": "RevisionNotFound"})
        return repository, commit

    def whoami(self) -> None:
        if self.role is None:
            return self.answer(401, {"error": "Invalid user token."})
        token: dict = {"displayName": "test", "role": self.role}
        if self.role == "fineGrained":
            scopes = [
                {"entity": {"type": "model" if "/" in name else "user", "name": name}, "permissions": ["repo.write"]}
                for name in self.hub.writable
            ]
            token["fineGrained"] = {"canReadGatedRepos": False, "global": [], "scoped": scopes}
        orgs = [{"name": "Our-Lab", "roleInOrg": "write"}, {"name": "readers", "roleInOrg": "read"}]
        self.answer(200, {"name": "me", "type": "user", "auth": {"accessToken": token}, "orgs": orgs})

    def create_repo(self) -> None:
        request = json.loads(self.body)
        repo_id = f"{request.get('organization') or 'me'}/{request['name']}"
        is_space = request.get("type") == "space"
        if is_space and request.get("sdk") not in ("gradio", "static", "docker"):
            return self.answer(400, {"error": "a Space needs an SDK"})
        repo_id = f"spaces/{repo_id}" if is_space else repo_id
        if not self.can_write(repo_id):
            return self.answer(401 if self.role is None else 403, {"error": "no"})
        url = f"http://{self.headers['Host']}/{repo_id}"
        if repo_id in self.hub.repositories:
            return self.answer(409, {"error": "You already created this repo", "url": url})
        private = request.get("private") or request.get("visibility") == "private"
        self.hub.create(repo_id, private=bool(private))
        self.answer(200, {"url": url, "name": repo_id, "id": repo_id})

    def validate_yaml(self) -> None:
        self.answer(200, {"errors": [], "warnings": []})

    def info(self, repo_id: str, revision: str = "main") -> None:
        if found := self.find(repo_id, revision):
            repository, commit = found
            siblings = [{"rfilename": name} for name in sorted(commit.files)]
            name, private = repo_id.removeprefix("spaces/"), repository.private
            facts = {"id": name, "sha": commit.oid, "private": private, "siblings": siblings, "tags": []}
            self.answer(200, facts)

    def auth_check(self, repo_id: str) -> None:
        if self.find(repo_id, write=True):
            self.answer(200, {})

    def tree(self, repo_id: str, revision: str) -> None:
        if found := self.find(repo_id, revision):
            files = found[1].files.items()
            self.answer(
                200,
                [
                    {"type": "file", "path": name, "size": len(data), "oid": git_oid(data)}
                    for name, data in sorted(files)
                ],
            )

    def preupload(self, repo_id: str, revision: str) -> None:
        if found := self.find(repo_id, revision, write=True):
            existing = found[1].files
            self.answer(
                200,
                {
                    "files": [
                        {
                            "path": file["path"],
                            "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
                            "shouldIgnore": False,
                            "oid": git_oid(existing[file["path"]]) if file["path"] in existing else None,
                        }
                        for file in json.loads(self.body)["files"]
                    ]
                },
            )

    def lfs_batch(self, repo_id: str) -> None:
        if self.find(repo_id, write=True):
            objects = []
            for requested in json.loads(self.body)["objects"]:
                entry = {"oid": requested["oid"], "size": requested["size"]}
                if requested["oid"] not in self.hub.uploads:
                    entry["actions"] = {"upload": {"href": f"http://{self.headers['Host']}/lfs/{requested['oid']}"}}
                objects.append(entry)
            self.answer(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.answer(400, {"error": "the content does not match its oid"})
        self.hub.uploads[oid] = self.body
        self.answer(200, {})

    def commit(self, repo_id: str, revision: str) -> None:
        if found := self.find(repo_id, revision, write=True):
            files, message = dict(found[1].files), ""
            for line in self.body.decode().splitlines():
                entry = json.loads(line)
                value = entry["value"]
                match entry["key"]:
                    case "header":
                        message = value["summary"]
                    case "file":
                        files[value["path"]] = base64.b64decode(value["content"])
                    case "lfsFile":
                        if value["oid"] not in self.hub.uploads:
                            return self.answer(400, {"error": f"{value['path']} was not uploaded"})
                        files[value["path"]] = self.hub.uploads[value["oid"]]
            commit = self.hub.commit(repo_id, message, files, revision)
            url = f"http://{self.headers['Host']}/{repo_id}/commit/{commit.oid}"
            self.answer(200, {"success": True, "commitOid": commit.oid, "commitUrl": url, "hookOutput": ""})

    def resolve(self, repo_id: str, revision: str, file: str) -> None:
        if found := self.find(repo_id, revision):
            commit = found[1]
            if file not in commit.files:
                headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit.oid}
                return self.answer(404, {"error": "Entry not found"}, headers)
            data = commit.files[file]
            headers = {
                "X-Repo-Commit": commit.oid,
                "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
                "Accept-Ranges": "bytes",
            }
            ranges = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if ranges:
                start, end = int(ranges[1]), int(ranges[2] or len(data) - 1)
                headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
                return self.answer(206, data[start : end + 1], headers)
            self.answer(200, data, headers)


def git_oid(data: bytes) -> str:
    """Return Git's hash of a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


REPO, REVISION = r"(?P<repo_id>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
API, FILES = rf"/api/(?:models|(?P<space>spaces))/{REPO}", rf"/(?P<space>spaces/)?{REPO}"
ROUTES = [
    (r"GET /api/whoami-v2", Handler.whoami),
    (r"POST /api/repos/create", Handler.create_repo),
    (r"POST /api/validate-yaml", Handler.validate_yaml),
    (rf"GET {API}", Handler.info),
    (rf"GET {API}/revision/{REVISION}", Handler.info),
    (rf"GET {API}/auth-check/write", Handler.auth_check),
    (rf"GET {API}/tree/{REVISION}", Handler.tree),
    (rf"POST {API}/preupload/{REVISION}", Handler.preupload),
    (rf"POST {API}/commit/{REVISION}", Handler.commit),
    (rf"POST {FILES}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (r"PUT /lfs/(?P<oid>[0-9a-f]+)", Handler.lfs_put),
    (rf"(?:GET|HEAD) {FILES}/resolve/{REVISION}/(?P<file>.+)", Handler.resolve),
]
