"""A Hub in memory: what the real clients ask of it, and the faults it is told to make.

It speaks the HTTP of create, preupload, LFS, commit, branches, tree, resolve (with ranges) for models, data sets and
spaces. A fault is ``(method, pattern of the path, kind, times)``; kinds are ``error`` (500), those of
``REFUSALS``, ``cut`` (the connection closes in the middle), ``lost`` (all is done, and the connection closes before the
answer), ``slow`` (the body comes late) and ``race`` (someone else commits first).
"""

import base64
import hashlib
import json
import re
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml

REFUSALS = {
    "busy": (503, "", "try again later"),
    "gated": (403, "GatedRepo", "ask for access"),
    "hidden": (404, "RepoNotFound", "not found"),
    "denied": (401, "", "Invalid credentials in Authorization header"),
}
LFS = (".safetensors", ".parquet", ".bin", ".faiss")


class Repository:
    def __init__(self):
        self.commits = {"0" * 40: {}}  # commit: {path: digest}
        self.refs = {"main": "0" * 40}

    def resolve(self, revision):
        commit = self.refs.get(revision, revision)
        return (commit, self.commits[commit]) if commit in self.commits else None

    def commit(self, ref, tree):
        commit = hashlib.sha1(f"{ref} {len(self.commits)} {sorted(tree.items())}".encode()).hexdigest()
        self.commits[commit], self.refs[ref] = tree, commit
        return commit


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.blobs, self.requests, self.faults = {}, {}, [], []
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def files(self, name, kind="model", revision="main"):
        _, tree = self.repositories[kind, name].resolve(revision)
        return {path: self.blobs[digest] for path, digest in tree.items()}

    def put(self, name, files, kind="model"):
        """Commit files as someone at the site itself would."""
        repository = self.repositories.setdefault((kind, name), Repository())
        for content in files.values():
            self.blobs[digest_of(content)] = content
        tree = {**repository.resolve("main")[1], **{path: digest_of(content) for path, content in files.items()}}
        return repository.commit("main", tree)

    def fault(self, method, path):
        with self.lock:
            for fault in self.faults:
                if fault[0] == method and re.search(fault[1], path) and fault[3] > 0:
                    fault[3] -= 1
                    return fault[2]
        return None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, code, body=b"", headers=()):
        if self.current_fault == "lost":
            self.close_connection = True
            return
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Length": str(len(body)), "Content-Type": "application/json", **dict(headers)}
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            if self.current_fault == "slow":
                threading.Event().wait(1)  # tests replace time.sleep
            if self.current_fault == "cut":
                self.wfile.write(body[: len(body) // 2])
                self.close_connection = True
                return
            self.wfile.write(body)

    def refuse(self, code, name, **headers):
        self.answer(code, {"error": name}, {"X-Error-Code": name, "X-Error-Message": name, **headers})

    def body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def handle_request(self):
        data = self.body()
        url = urllib.parse.urlsplit(self.path)
        path, query = urllib.parse.unquote(url.path), dict(urllib.parse.parse_qsl(url.query))
        self.server.requests.append(f"{self.command} {path}")
        self.current_fault = self.server.fault(self.command, path)
        if self.current_fault == "error":
            return self.answer(500, {"error": "a fault was asked for"})
        if self.current_fault in REFUSALS:
            code, name, message = REFUSALS[self.current_fault]
            return self.answer(code, {"error": message}, {"X-Error-Code": name, "X-Error-Message": message})
        if self.current_fault == "cut" and self.command in ("PUT", "POST"):  # before anything of it is kept
            self.close_connection = True
            return None
        if path == "/api/whoami-v2":
            return self.answer(200, {"type": "user", "name": "org", "orgs": [], "auth": {"type": "access_token"}})
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create(json.loads(data))
        if path.startswith("/_lfs/"):
            return self.upload(path.removeprefix("/_lfs/"), data)
        if found := re.match(r"/(?:(dataset|space)s/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch$", path):
            return self.lfs(json.loads(data))
        if found := re.match(r"/api/(model|dataset|space)s/([^/]+/[^/]+)(?:/([^/]+)(?:/(.*))?)?$", path):
            kind, name, operation, rest = found.groups()
            return self.api(kind, name, operation or "revision", rest or "main", query, data)
        if found := re.match(r"/(?:(dataset|space)s/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)$", path):
            return self.file(found[1] or "model", *found.groups()[1:])
        return self.refuse(404, "NotFound")

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = handle_request

    def create(self, wanted):
        kind, name = wanted.get("type") or "model", f"{wanted.get('organization') or 'org'}/{wanted['name']}"
        new = (kind, name) not in self.server.repositories
        if kind == "space" and not wanted.get("sdk"):
            return self.answer(400, {"error": "sdk is required"})
        self.server.repositories.setdefault((kind, name), Repository())
        if new and kind == "space":
            self.server.put(name, {".gitattributes": b"", "README.md": b"---\nsdk: gradio\n---\n\nCheck out"}, kind)
        prefix = "" if kind == "model" else f"{kind}s/"
        return self.answer(200 if new else 409, {"url": f"{self.server.url}/{prefix}{name}", "name": name, "id": name})

    def lfs(self, wanted):
        objects = []
        for one in wanted["objects"]:
            href = f"{self.server.url}/_lfs/{one['oid']}"
            known = one["oid"] in self.server.blobs
            objects.append({**one, **({} if known else {"actions": {"upload": {"href": href, "header": {}}}})})
        self.answer(200, {"transfer": "basic", "objects": objects})

    def upload(self, digest, data):
        if hashlib.sha256(data).hexdigest() != digest:
            return self.answer(400, {"error": "not what was announced"})
        self.server.blobs[digest] = data
        return self.answer(200)

    def api(self, kind, name, operation, rest, query, data):
        repository = self.server.repositories.get((kind, name))
        if repository is None:
            return self.refuse(404, "RepoNotFound")
        if operation == "branch":
            repository.refs.setdefault(rest, repository.refs["main"])
            return self.answer(200, {})
        if operation == "refs":
            branches = [{"name": r, "ref": f"refs/heads/{r}", "targetCommit": c} for r, c in repository.refs.items()]
            return self.answer(200, {"branches": branches, "tags": [], "converts": []})
        revision, _, folder = (
            (rest, "", "") if operation in ("revision", "commit", "preupload") else rest.partition("/")
        )
        found = repository.resolve(revision)
        if found is None:
            return self.refuse(404, "RevisionNotFound")
        commit, tree = found
        if operation == "revision":
            return self.answer(200, self.info(name, commit, tree))
        if operation == "preupload":
            modes = [(f["path"], "lfs" if f["path"].endswith(LFS) else "regular") for f in json.loads(data)["files"]]
            files = [{"path": p, "uploadMode": m, "shouldIgnore": False, "oid": tree.get(p)} for p, m in modes]
            return self.answer(200, {"files": files})
        if operation == "commit":
            return self.commit(repository, name, revision, query, data)
        if operation == "paths-info":
            text = data.decode()
            asked = json.loads(text)["paths"] if text.startswith("{") else urllib.parse.parse_qs(text).get("paths", [])
            return self.answer(200, [e for e in self.entries(tree, "", True) if e["path"] in asked])
        if operation == "tree":
            entries = self.entries(tree, folder, query.get("recursive", "").lower() in ("true", "1"))
            return self.answer(200, entries) if entries or not folder else self.refuse(404, "EntryNotFound")
        return self.refuse(404, "NotFound")

    def info(self, name, commit, tree):
        card = {}
        if "README.md" in tree and (
            front := re.match(r"---\n(.*?)\n---", self.server.blobs[tree["README.md"]].decode(), re.S)
        ):
            card = yaml.safe_load(front[1]) or {}
        siblings = [{"rfilename": path} for path in sorted(tree)]
        return {"id": name, "sha": commit, "private": False, "tags": [], "cardData": card, "siblings": siblings}

    def commit(self, repository, name, revision, query, data):
        if self.current_fault == "race":
            repository.commit(revision, {**repository.resolve(revision)[1], "race.txt": digest_of(b"first")})
            self.server.blobs[digest_of(b"first")] = b"first"
        commit, tree = repository.resolve(revision)
        tree = dict(tree)
        for line in map(json.loads, data.splitlines()):
            value = line["value"]
            if line["key"] == "header" and value.get("parentCommit") not in (None, commit):
                return self.refuse(412, "PreconditionFailed")
            if line["key"] == "file":
                content = base64.b64decode(value["content"])
                tree[value["path"]] = digest_of(content)
                self.server.blobs[digest_of(content)] = content
            if line["key"] == "lfsFile":
                tree[value["path"]] = value["oid"]
            if line["key"] == "deletedFile":
                tree.pop(value["path"], None)
        request = "create_pr" in query
        commit = repository.commit("refs/pr/1" if request else revision, tree)
        answer = {"success": True, "commitOid": commit, "commitUrl": f"{self.server.url}/{name}/commit/{commit}"}
        if request:
            answer["pullRequestUrl"] = f"{self.server.url}/{name}/discussions/1"
        return self.answer(200, answer)

    def entries(self, tree, folder, recursive):
        entries, folders, start = [], set(), f"{folder}/" if folder else ""
        for path, digest in sorted(tree.items()):
            if path.startswith(start):
                within = path.removeprefix(start)
                folders |= {start + within[: m.start()] for m in re.finditer("/", within)}
                size = len(self.server.blobs[digest])
                entry = {"type": "file", "path": path, "size": size, "oid": digest}
                if path.endswith(LFS):
                    entry["lfs"] = {"oid": digest, "size": size, "pointerSize": 130}
                entries.append(entry)
        entries += [{"type": "directory", "path": path, "size": 0, "oid": digest_of(path.encode())} for path in folders]
        return entries if recursive else [e for e in entries if "/" not in e["path"].removeprefix(start)]

    def file(self, kind, name, revision, path):
        repository = self.server.repositories.get((kind, name))
        if repository is None:
            return self.refuse(404, "RepoNotFound")
        found = repository.resolve(revision)
        if found is None:
            return self.refuse(404, "RevisionNotFound")
        commit, tree = found
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if path not in tree:
            return self.refuse(404, "EntryNotFound", **headers)
        content = self.server.blobs[tree[path]]
        headers["ETag"] = f'"{tree[path]}"'
        if path.endswith(LFS):
            headers |= {"X-Linked-Etag": f'"{tree[path]}"', "X-Linked-Size": str(len(content))}
        if wanted := re.match(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or ""):
            first = int(wanted[1]) if wanted[1] else len(content) - int(wanted[2])
            last = min(int(wanted[2]) if wanted[1] and wanted[2] else len(content) - 1, len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            return self.answer(206, content[first : last + 1], headers)
        if self.command == "HEAD":
            return self.answer(200, b"", {**headers, "Content-Length": str(len(content))})
        return self.answer(200, content, headers)


def digest_of(content):
    return hashlib.sha256(content).hexdigest()


def point_client_at(url, monkeypatch, offline=False):
    """Point the real client in this process at a server."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub._tree_cache._IN_MEMORY_TREE_CACHE", {})
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # it would keep the address of the test before
