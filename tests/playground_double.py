"""A stand-in for ``colada serve``: the same events, and refusals, stalls and lost connections at will.

Its words depend on the request alone, and so does every number.
"""

from __future__ import annotations

import base64
import json
import random
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import colada

STATIC = Path(colada.__file__).parent / "serve/playground"
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
BLOCK = 4
STORY = (
    ", there was a little girl named Mia . She had a small red boat . One day , she went to the big lake "
    "with her dad . The boat was so fast ! It went far away , and Mia was sad . Then a kind duck came and "
    "pushed the boat back to her . Mia smiled and thanked the duck . The sun was warm , and they played "
    "until the day was over . At home , Mia told her mom about the duck . They had soup and bread . "
)
OTHERS = ["boy", "dog", "old", "green", "house", "was", "ran", "tree", "bird", "over", "blue", "sang"]


def spelled(words: list[str]) -> list[str]:
    """Words as tokens with the space before them; none before punctuation."""
    return [word if word in ",.!" else f" {word}" for word in words]


def story(body: dict[str, Any]) -> list[str]:
    """The tokens of an answer: a request's own."""
    shuffled = random.Random(
        body["prompt"] + str(body.get("suffix")) + str(body.get("seed", 0)) + str(body.get("model"))
    )
    steps = body.get("colada", {}).get("steps", 16)
    words = [
        word if shuffled.random() > 0.04 + 0.3 / steps else shuffled.choice(OTHERS)
        for word in (STORY * 9).split()
    ]
    start = 0 if body["prompt"] else 1
    return spelled(words[start : start + body.get("max_tokens", 16)])


def direction(token: str) -> list[float]:
    """The three directions of a token's latent."""
    place = random.Random(token)
    return [max(-1.0, min(1.0, place.gauss(0, 0.45))) for _ in range(3)]


class Double(ThreadingHTTPServer):
    """The server. Its attributes may be set at any time."""

    daemon_threads = True
    key: str | None = None
    refusal: tuple[int, str, str, int | None] | None = (
        None  # Of the next request: status, code, message, retry.
    )
    breaks_after: int | None = None  # Blocks, then the connection is lost.
    step_seconds = 0.002
    first_seconds = 0.0
    words: list[str] | None = None  # Tokens in place of the story's.
    infill = True

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.left = 0  # Clients that left before their end.
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that left is no error here."""

    def models(self) -> list[dict[str, Any]]:
        defaults = {
            "steps": 16,
            "guidance": 7.0,
            "guidance_interval": [0, 1],
            "solver": "ab2",
            "schedule": "front-loaded",
        }
        sampling = {"temperature": 0.0, "top_p": 1.0}
        limits = {"max_steps": 64, "max_tokens": 256, "max_context": 8192, "block": BLOCK, "patch": 1}
        names = {
            "against": ["block", "latents"],
            "solvers": ["euler", "ab2"],
            "schedules": ["uniform", "front-loaded", "logit-normal"],
        }
        cola = {
            "arch": "cola",
            "infill": self.infill,
            "defaults": {**defaults, **sampling},
            **limits,
            **names,
        }
        decoder = {"arch": "ar", "infill": False, "defaults": sampling, **limits}
        return [
            {"id": name, "object": "model", "created": 0, "owned_by": "colada", "colada": about}
            for name, about in (("cola", cola), ("ar", decoder))
        ]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Double

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def answer(self, status: int, body: bytes, kind: str = "application/json", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", CSP)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def told(self, told: Any, status: int = 200, **headers: str) -> None:
        self.answer(status, json.dumps(told).encode(), **headers)

    def refuse(self, status: int, code: str, message: str, retry: int | None = None) -> None:
        headers = {} if retry is None else {"Retry_After": str(retry)}
        self.told({"error": {"message": message, "type": "", "param": None, "code": code}}, status, **headers)

    def admitted(self) -> bool:
        if self.server.key and self.headers.get("Authorization") != f"Bearer {self.server.key}":
            self.refuse(401, "invalid_api_key", "The key is missing or wrong.")
            return False
        return True

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if path == "/ready":
            self.told(
                {"status": "ready", "running": 0, "waiting": 0, "slots": 8, "key": bool(self.server.key)}
            )
        elif path == "/v1/models":
            if self.admitted():
                self.told({"object": "list", "data": self.server.models()})
        else:
            file = STATIC / ("index.html" if path == "/" else path.removeprefix("/playground/"))
            if file.parent == STATIC and file.is_file():
                self.answer(200, file.read_bytes(), KINDS[file.suffix])
            else:
                self.refuse(404, "not_found", "not found")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.admitted():
            return
        if self.path == "/tokenize":
            self.told({"tokens": [], "count": max(1, len(body["prompt"].split())), "max_model_len": 8192})
            return
        self.server.asked.append(body)
        refusal, self.server.refusal = self.server.refusal, None
        if refusal:
            self.refuse(*refusal)
        elif body.get("stream"):
            try:
                self.stream(body)
            except OSError:
                self.server.left += 1
                self.close_connection = True
        else:
            text = "".join(self.server.words or story(body))
            self.told({"choices": [{"index": 0, "text": text, "finish_reason": "length"}], "usage": {}})

    def event(self, told: Any) -> None:
        data = f"data: {told if isinstance(told, str) else json.dumps(told)}\n\n".encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def stream(self, body: dict[str, Any]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        asked = body.get("colada", {})
        steps, words = asked.get("steps", 16), self.server.words or story(body)
        size = 1 if body["model"] == "ar" else BLOCK
        head = {
            "id": "cmpl-0",
            "object": "text_completion",
            "created": 0,
            "model": body["model"],
            "usage": None,
        }
        time.sleep(self.server.first_seconds)
        self.event({**head, "choices": [{"index": 0, "text": "", "finish_reason": None}]})
        for block in range(-(-len(words) // size)):
            if block == self.server.breaks_after:
                time.sleep(0.3)  # What was sent has been read.
                self.close_connection = True
                return
            tokens = words[block * size : (block + 1) * size]
            noise = random.Random(f"{body.get('seed', 0)} {block}")
            starts = [[noise.gauss(0, 0.5) for _ in range(3)] for _ in tokens]
            for step in range(1, steps + 1) if size > 1 else ():
                time.sleep(self.server.step_seconds)
                if asked.get("guesses"):
                    guess = self.guess(tokens, starts, 1 - step / steps, noise)
                    about = {
                        "type": "guess",
                        "index": 0,
                        "block": block,
                        "step": step,
                        "steps": steps,
                        **guess,
                    }
                    self.event({**head, "choices": [], "colada": about})
            if size == 1:
                time.sleep(self.server.step_seconds * 4)
            about = {"type": "block", "index": 0, "block": block, **self.guess(tokens, starts, 0.0, noise)}
            extra = {"colada": about} if asked.get("guesses") else {}
            self.event(
                {**head, "choices": [{"index": 0, "text": "".join(tokens), "finish_reason": None}], **extra}
            )
        self.event({**head, "choices": [{"index": 0, "text": "", "finish_reason": "length"}]})
        usage = {"prompt_tokens": 4, "completion_tokens": len(words), "total_tokens": 4 + len(words)}
        self.event({**head, "choices": [], "usage": usage})
        self.event("[DONE]")
        self.wfile.write(b"0\r\n\r\n")

    def guess(
        self, tokens: list[str], starts: list[list[float]], a: float, noise: random.Random
    ) -> dict[str, Any]:
        """How a block reads when a share of noise is left."""
        read = []
        for token in tokens:
            sure = noise.random() > a * 1.1
            text = token if sure or a == 0 else " " + noise.choice(OTHERS)
            read.append(
                [len(text), text, round(max(0.08, min(0.995, (1 - a) ** 1.2 * noise.uniform(0.75, 1.1))), 3)]
            )
        numbers = [
            round(128 + 127 * max(-1, min(1, a * start + (1 - a) * end)))
            for token, origin in zip(tokens, starts, strict=True)
            for start, end in zip(origin, direction(token), strict=True)
        ]
        latents = base64.b64encode(bytes(numbers)).decode()
        return {"a": a, "text": "".join(text for _, text, _ in read), "tokens": read, "latents": latents}
