"""A stand-in for W&B's server on this machine: takes what W&B's own client sends, and keeps it."""

import gzip
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server(ThreadingHTTPServer):
    """Keeps a run by its id: how it was called, its config, history, summary and exit code."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.runs: dict[str, dict[str, Any]] = {}

    @property
    def environment(self) -> dict[str, str]:
        """With which W&B's client takes this server for W&B, and somebody for logged in."""
        return {"WANDB_BASE_URL": f"http://127.0.0.1:{self.server_port}", "WANDB_API_KEY": "0" * 40}

    def kept(self, run_id: str) -> dict[str, Any]:
        """What came of one run."""
        fresh = {"called": {}, "config": {}, "history": [], "summary": {}, "exit_code": None}
        return self.runs.setdefault(run_id, fresh)

    def answer(self, query: str, given: dict[str, Any]) -> dict[str, Any]:
        """The answer to one request of the client's."""
        named = re.search(r"(?:query|mutation)\s+(\w+)", query)
        project = {"id": "p", "name": "p", "entity": {"id": "e", "name": "me"}}
        if named and named[1] == "UpsertBucket":
            run = self.kept(given["name"])
            labels = {key: given[key] for key in ("displayName", "groupName", "jobType", "tags")}
            run["called"] |= {key: value for key, value in labels.items() if value}
            run["config"] |= json.loads(given["config"] or "{}")
            bucket = {"id": given["name"], "name": given["name"], "project": project,
                      "displayName": run["called"]["displayName"], "config": "{}",
                      "sweepName": None, "historyLineCount": len(run["history"])}  # fmt: skip
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if named and named[1] == "RunResumeStatus":
            run = self.runs.get(given["name"])
            bucket = run and {
                "name": given["name"], "displayName": run["called"]["displayName"], "tags": [],
                "summaryMetrics": json.dumps(run["summary"]), "config": json.dumps(run["config"]),
                "historyLineCount": len(run["history"]), "eventsLineCount": 0, "logLineCount": 0,
                "historyTail": json.dumps([json.dumps(row) for row in run["history"][-1:]]),
                "eventsTail": "[]", "wandbConfig": '{"t": 1}',
            }  # fmt: skip
            return {"model": project | {"bucket": bucket}}
        if "viewer" in query:
            return {"viewer": {"id": "1", "entity": "me", "username": "me", "flags": "{}",
                               "teams": {"edges": []}}}  # fmt: skip
        return {}

    def stream(self, run_id: str, sent: dict[str, Any]) -> None:
        """Keeps lines of a run's history at their place, the newest summary, and its end."""
        run, files = self.kept(run_id), sent.get("files") or {}
        if lines := files.get("wandb-history.jsonl"):
            rows = [json.loads(line) for line in lines["content"]]
            run["history"][lines["offset"] :] = rows
        if lines := files.get("wandb-summary.json"):
            run["summary"] = json.loads(lines["content"][-1])
        if sent.get("exitcode") is not None:
            run["exit_code"] = sent["exitcode"]


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        self._send({})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        if self.path.endswith("/file_stream"):
            self.server.stream(self.path.split("/")[-2], json.loads(body))
            self._send({})
        elif self.path.endswith("/graphql"):
            sent = json.loads(body)
            found = self.server.answer(sent["query"], sent.get("variables") or {})
            self._send({"data": found} | ({} if found else {"errors": [{"message": "unknown"}]}))
        else:
            self._send({})

    def _send(self, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def wandb_server() -> Iterator[Server]:
    """A server that runs within it."""
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
