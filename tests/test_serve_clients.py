"""Clients that people have, unmodified, against a server: each skips where it is not installed.

``pip install -c constraints.txt ".[clients]"`` brings those of Python; npm's is looked for in
``$COLADA_NODE_MODULES``.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from colada.models.cola import ColaDLM
from colada.serve.admission import Limits, Policy
from serving import Answer, Json, Running, ask, byte_model, check_answer, running

pytestmark = pytest.mark.slow

KEY = "a-key"


@pytest.fixture(scope="module")
def model() -> ColaDLM:
    return byte_model()


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    limits = Limits(capacity=2048, max_tokens=512, slots=8)
    with running({"bytes": byte_model()}, limits, Policy(keys=[KEY], log="off")) as server:
        yield server
        server.empty()


@pytest.fixture
def url(server: Running) -> str:
    return f"http://localhost:{server.port}/v1"


MESSAGES: list[Any] = [{"role": "user", "content": "hello"}]


@pytest.fixture
def words(model: ColaDLM) -> str:
    """What the model answers to the messages, and continues "hello" with, in twelve tokens."""
    return model.chat(MESSAGES, 12, end_ids=()).text


# --- openai of PyPI ------------------------------------------------------------------------------


def test_openai_completes_chats_and_streams(url: str, model: ColaDLM, words: str) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=url, api_key=KEY)
    assert [card.id for card in client.models.list()] == ["bytes"]
    wanted = model.generate(["hello"], 12, seed=3, temperature=1.0, end_ids=())[0]
    more: dict[str, Any] = {"model": "bytes", "extra_body": {"ignore_eos": True}}
    done = client.completions.create(prompt="hello", max_tokens=12, seed=3, temperature=1.0, **more)
    assert (done.choices[0].text, done.usage.completion_tokens) == (wanted.text, len(wanted.tokens))
    assert done.choices[0].colada["seed"] == 3
    said = client.chat.completions.create(messages=MESSAGES, max_completion_tokens=12, **more)
    assert said.choices[0].message.content == words
    stream = client.chat.completions.create(
        messages=MESSAGES, max_tokens=12, stream=True, stream_options={"include_usage": True}, **more
    )
    *chunks, last = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == words
    assert last.usage.completion_tokens == len(wanted.tokens)
    extension = {"ignore_eos": True, "colada": {"guesses": True, "steps": 4}}
    watched = list(
        client.completions.create(
            model="bytes", prompt="hello", max_tokens=12, stream=True, extra_body=extension
        )
    )
    assert sum(not chunk.choices for chunk in watched) == 4 * 4  # Guesses of four blocks, as five share one.


def test_openai_asks_in_its_own_loop(url: str, words: str) -> None:
    openai = pytest.importorskip("openai")

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=url, api_key=KEY) as client:

            async def one() -> str:
                stream = await client.chat.completions.create(
                    model="bytes",
                    messages=MESSAGES,
                    max_tokens=12,
                    stream=True,
                    extra_body={"ignore_eos": True},
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*[one() for _ in range(10)])

    assert asyncio.run(all_of_them()) == [words] * 10


def test_openai_raises_what_is_refused(url: str, server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=url, api_key=KEY, max_retries=2)
    ask_for = client.completions.create
    with pytest.raises(openai.BadRequestError, match="frequency_penalty") as bad:
        ask_for(model="bytes", prompt="a", frequency_penalty=1)
    assert (bad.value.param, bad.value.code) == ("frequency_penalty", "unsupported_parameter")
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        ask_for(model="other", prompt="a")
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=url, api_key="wrong").models.list()
    with pytest.raises(openai.NotFoundError, match="/colada/encode"):
        client.embeddings.create(model="bytes", input="a")

    def requests(status: int) -> float:
        server.empty()  # A request is counted once it has ended, a little after its answer.
        client.models.list()
        counted = server.service.metrics.requests.labels("/v1/completions", status)
        return float(counted._value.get())

    # Three times where it is busy, after what it is told to wait; once where it would fail again.
    admission = server.service.admission
    before = requests(429)
    monkeypatch.setattr(admission, "places", 10**6)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(openai.RateLimitError) as full:
        ask_for(model="bytes", prompt="a")
    monkeypatch.undo()
    assert (full.value.code, requests(429) - before) == ("queue_full", 3)

    from colada.text.tokenizer import Tokenizer

    def fails(self: Tokenizer, text: str) -> list[int]:
        raise RuntimeError

    monkeypatch.setattr(Tokenizer, "encode", fails)
    before = requests(500)
    with pytest.raises(openai.InternalServerError):
        ask_for(model="bytes", prompt="a")
    assert requests(500) - before == 1


def test_openai_raises_what_fails_within_a_stream(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    openai = pytest.importorskip("openai")
    from colada.generate.engine.transport import Transport

    plain, rounds = Transport.run, [0]

    def fails(*arguments: Any) -> Any:
        rounds[0] += 1
        if rounds[0] == 3:
            raise RuntimeError("broken")
        return plain(*arguments)

    monkeypatch.setattr(Transport, "run", fails)
    client = openai.OpenAI(base_url=url, api_key=KEY)
    stream = client.completions.create(
        model="bytes", prompt="a", max_tokens=40, stream=True, extra_body={"ignore_eos": True}
    )
    with pytest.raises(openai.APIError) as failed:
        list(stream)
    assert failed.value.code == "internal"


# --- others --------------------------------------------------------------------------------------


def test_langchain_invokes_streams_and_batches(url: str, words: str) -> None:
    langchain = pytest.importorskip("langchain_openai")
    more: dict[str, Any] = {"model": "bytes", "base_url": url, "api_key": KEY, "max_tokens": 12}
    chat = langchain.ChatOpenAI(**more, extra_body={"ignore_eos": True})
    assert chat.invoke("hello").content == words
    assert "".join(chunk.content for chunk in chat.stream("hello")) == words
    assert [message.content for message in chat.batch(["hello"] * 3)] == [words] * 3
    plain = langchain.OpenAI(**more, extra_body={"ignore_eos": True}, temperature=0)
    wanted = byte_model().generate(["hello"], 12, end_ids=())[0].text
    assert plain.invoke("hello") == wanted == "".join(plain.stream("hello"))


def test_llm_prompts_a_chat_and_a_completion(url: str, tmp_path: Path) -> None:
    pytest.importorskip("llm")
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- {{model_id: chat, model_name: bytes, api_base: '{url}', api_key_name: mine}}\n"
        f"- {{model_id: text, model_name: bytes, api_base: '{url}', api_key_name: mine, completion: true}}\n"
    )
    (tmp_path / "keys.json").write_text(json.dumps({"mine": KEY}))
    env = {**os.environ, "LLM_USER_PATH": str(tmp_path)}
    model = byte_model()
    wanted = {
        "chat": model.chat([{"role": "user", "content": "hello"}], 12).text,
        "text": model.generate(["hello"], 12)[0].text,
    }
    for name, text in wanted.items():
        for stream in ([], ["--no-stream"]):
            command = [sys.executable, "-m", "llm", "-m", name, "-o", "max_tokens", "12", *stream, "hello"]
            done = subprocess.run(command, env=env, capture_output=True, check=True, timeout=120)
            assert done.stdout.decode() == text + "\n"


def lm_eval(url: str, kind: str, task: Path, *args: str) -> subprocess.CompletedProcess[str]:
    model = f"model=bytes,base_url={url},tokenizer_backend=None,tokenized_requests=False,num_concurrent=2"
    command = [sys.executable, "-m", "lm_eval", "run", "--model", kind, "--model_args", model]
    command += ["--tasks", "stories", "--include_path", str(task), *args]
    env = {**os.environ, "OPENAI_API_KEY": KEY, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("kind", ["local-completions", "local-chat-completions"])
def test_lm_eval_generates(url: str, kind: str, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    pytest.importorskip("tenacity", reason="lm_eval asks servers by it: pip install lm-eval[api]")
    write_task(tmp_path)
    path = "/chat/completions" if "chat" in kind else "/completions"
    more = ["--apply_chat_template"] if "chat" in kind else ["--batch_size", "2"]
    done = lm_eval(url + path, kind, tmp_path, *more, "--log_samples", "--output_path", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr[-3000:]
    (samples,) = (tmp_path / "out").rglob("samples_stories_*.jsonl")
    model = byte_model()
    for line in map(json.loads, samples.read_text().splitlines()):
        prompt = line["doc"]["text"]
        settings: Json = {"seed": 1234, "stop": ["e"]}
        wanted = (
            model.chat([{"role": "user", "content": prompt}], 10, **settings)
            if "chat" in kind
            else model.generate([prompt], 10, **settings)[0]
        )
        assert line["resps"] == [[wanted.text]]


def test_lm_eval_is_told_that_there_are_no_logprobs(server: Running) -> None:
    # What it sends for a log-likelihood, which it only does with a tokenizer of its own.
    asked: Json = {"model": "bytes", "prompt": [[1, 2, 3]], "temperature": 0, "max_tokens": 1, "logprobs": 1}
    asked |= {"seed": 1234, "echo": True}
    refused = server.post("/v1/completions", asked, Authorization=f"Bearer {KEY}")
    assert (refused.status, refused.error["param"]) == (400, "logprobs")
    assert "colada eval harness" in refused.error["message"]


def write_task(directory: Path) -> None:
    lines = [json.dumps({"text": f"story {number}"}) + "\n" for number in range(3)]
    (directory / "data.jsonl").write_text("".join(lines))
    (directory / "stories.yaml").write_text(
        "task: stories\ndataset_path: json\ntest_split: test\n"
        f"dataset_kwargs: {{data_files: {{test: {directory / 'data.jsonl'}}}}}\n"
        "output_type: generate_until\ndoc_to_text: '{{text}}'\ndoc_to_target: a\n"
        "generation_kwargs: {until: ['e'], max_gen_toks: 10}\n"
    )


def test_curl_reads_a_stream_and_may_be_interrupted(server: Running, url: str) -> None:
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("no curl here")
    body: Json = {"prompt": "hello", "max_tokens": 12, "stream": True}
    command = [curl, "-sN", f"{url}/completions", "-H", f"Authorization: Bearer {KEY}"]
    command += ["-H", "Content-Type: application/json", "-d"]
    done = subprocess.run(
        [*command, json.dumps(body)], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.startswith('data: {"id":"cmpl-')
    assert done.stdout.endswith("data: [DONE]\n\n")
    long = json.dumps({**body, "max_tokens": 500, "ignore_eos": True, "colada": {"steps": 32}})
    with subprocess.Popen([*command, long], stdout=subprocess.PIPE) as left:
        assert left.stdout is not None
        left.stdout.read(10)
        left.send_signal(2)
    server.empty(5.0)


def test_openai_of_npm_streams_and_aborts(server: Running, url: str, words: str) -> None:
    modules = os.environ.get("COLADA_NODE_MODULES", "")
    if shutil.which("node") is None or not Path(modules, "openai").is_dir():
        pytest.skip("no node, or no package `openai` in $COLADA_NODE_MODULES")
    code = """
    const OpenAI = require("openai").default || require("openai");
    const client = new OpenAI({baseURL: process.argv[1], apiKey: process.argv[2]});
    const messages = [{role: "user", content: "hello"}];
    const body = {model: "bytes", messages, max_tokens: 12, ignore_eos: true};
    (async () => {
      let text = "";
      for await (const chunk of await client.chat.completions.create({...body, stream: true}))
        text += chunk.choices[0].delta.content || "";
      const whole = await client.chat.completions.create(body);
      let refused = "";
      try { await client.chat.completions.create({...body, frequency_penalty: 1}); }
      catch (error) { refused = error.param; }
      const stream = await client.chat.completions.create({...body, max_tokens: 500, stream: true});
      for await (const chunk of stream) { stream.controller.abort(); break; }
      console.log(JSON.stringify([text, whole.choices[0].message.content, refused]));
    })();
    """
    env = {**os.environ, "NODE_PATH": modules}
    command = ["node", "-e", code, url, KEY]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [words, words, "frequency_penalty"]
    server.empty(5.0)


# --- what others send, replayed; and what nobody would -------------------------------------------

REPLAYED: dict[str, tuple[str, Json]] = {
    "guidellm": (
        "/v1/completions",
        {
            "model": "bytes",
            "prompt": "hello",
            "max_tokens": 5,
            "max_completion_tokens": 5,
            "stop": None,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        },
    ),
    "vllm bench serve": (
        "/v1/completions",
        {
            "model": "bytes",
            "prompt": "hello",
            "temperature": 0.0,
            "repetition_penalty": 1.0,
            "max_tokens": 5,
            "logprobs": None,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        },
    ),
}


@pytest.mark.parametrize("name", REPLAYED)
def test_load_generators_are_understood(server: Running, model: ColaDLM, name: str) -> None:
    path, body = REPLAYED[name]
    answer = server.post(path, body, Authorization=f"Bearer {KEY}")
    check_answer(answer, body, model.generate(["hello"], 5, end_ids=()))


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/colada/decode"])
def test_whatever_fits_the_description_or_not_is_answered_by_it(
    server: Running, model: ColaDLM, path: str
) -> None:
    """A5: bodies made from the OpenAPI document, and others; meanwhile a good stream is what it is alone."""
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

    examples = int(os.environ.get("SERVE_EXAMPLES", "60"))
    described = server.get("/openapi.json").json
    operation = schemathesis.openapi.from_dict(described)[path]["POST"]
    every = [not_a_server_error, response_schema_conformance, status_code_conformance]
    statuses: set[int] = set()

    def try_all() -> None:
        for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):

            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(
                max_examples=examples,
                deadline=None,
                database=None,
                derandomize=True,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            def one(case: Any) -> None:
                headers = {"Authorization": f"Bearer {KEY}"}
                response = case.call(base_url=f"http://localhost:{server.port}", headers=headers, timeout=30)
                statuses.add(response.status_code)
                case.validate_response(response, checks=every)

            one()

    good: Json = {"prompt": "a good stream", "max_tokens": 200, "stream": True, "ignore_eos": True}

    async def beside() -> Answer:
        headers = {"Authorization": f"Bearer {KEY}"}
        stream = asyncio.ensure_future(ask(server.port, "/v1/completions", good, headers=headers))
        await asyncio.to_thread(try_all)
        return await stream

    check_answer(asyncio.run(beside()), good, model.generate(["a good stream"], 200, end_ids=()))
    assert 400 in statuses
    server.empty()
