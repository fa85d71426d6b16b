"""``colada serve``: an OpenAI-compatible server."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from colada.checks import require_choice
from colada.cli.options import DeviceOption, DtypeOption, QuantiseOption, check_model_options
from colada.errors import ColadaError
from colada.files import read_text
from colada.locate import BUNDLED_CHAT

KEYS_VARIABLE = "COLADA_API_KEYS"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
LOGS = ("text", "json", "off")
KERNELS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
"""oneDNN keeps a kernel of some 200 KB for every product of another size, by itself 1,024 of them: requests
that come and go make many sizes, and a server's memory would grow for hours."""


def serve(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME=]WHERE...",
            help="Model directories, or hub ids owner/name[@revision]. Default: the bundled models for texts"
            " and for chats.",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 is all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            help=f"Keys, one a line, of which clients send one. Also: {KEYS_VARIABLE}, with commas."
        ),
    ] = None,
    no_key: Annotated[bool, typer.Option("--no-key", help="Let anybody ask.")] = False,
    allowed_host: Annotated[
        list[str] | None, typer.Option(help="A further name that the server is called by; * is any.")
    ] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="An origin whose pages may ask; * is any. May be repeated.")
    ] = None,
    slots: Annotated[int, typer.Option(min=1, max=4096, help="Requests under way together.")] = 64,
    capacity: Annotated[
        int,
        typer.Option(
            min=1,
            max=2**24,
            help="Latents that a model's KV cache holds, of all requests under way; one takes no more.",
        ),
    ] = 8192,
    max_waiting: Annotated[
        int, typer.Option(min=0, max=2**20, help="Requests that may wait; more get 429.")
    ] = 256,
    max_context: Annotated[
        int | None,
        typer.Option(min=1, max=2**24, help="Tokens of a request, with its prompt. Default: --capacity's."),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(min=1, max=2**17, help="New tokens of a request at most.")
    ] = 8192,
    max_steps: Annotated[int, typer.Option(min=1, max=10_000, help="Solver steps a block at most.")] = 64,
    watchers: Annotated[
        int, typer.Option(min=0, max=4096, help="Requests that may stream guesses at once.")
    ] = 8,
    timeout: Annotated[
        float, typer.Option(min=1, max=86400, help="Seconds for a request, waiting included.")
    ] = 600,
    queue_timeout: Annotated[
        float, typer.Option(min=1, max=86400, help="Seconds that a request may wait; then it gets 503.")
    ] = 60,
    reader_timeout: Annotated[
        float, typer.Option(min=1, max=86400, help="Seconds until a client that takes nothing is given up.")
    ] = 60,
    max_connections: Annotated[
        int, typer.Option(min=1, max=2**16, help="Requests that may be open at once; more get 503.")
    ] = 1024,
    ping: Annotated[
        float, typer.Option(min=0, max=3600, help="Seconds of silence until a stream's comment; 0: none.")
    ] = 15,
    stall: Annotated[
        float, typer.Option(min=1, max=3600, help="Seconds without a step until /health says so.")
    ] = 60,
    drain: Annotated[
        float, typer.Option(min=0, max=3600, help="Seconds that requests have to finish at SIGTERM.")
    ] = 30,
    threads: Annotated[
        int | None, typer.Option(min=1, max=1024, help="torch's threads. Default: the cores less one.")
    ] = None,
    reproducible: Annotated[
        bool,
        typer.Option("--reproducible", help="One request after another: no rounding depends on the load."),
    ] = False,
    lenient: Annotated[bool, typer.Option("--lenient", help="Leave unknown fields of requests out.")] = False,
    metrics_public: Annotated[
        bool, typer.Option("--metrics-public", help="Show /metrics without a key.")
    ] = False,
    metrics_port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="Show metrics on a port of their own, without a key."),
    ] = None,
    log: Annotated[str, typer.Option(help="A line a request: text, json or off.")] = "text",
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="With what was asked in it.")] = False,
    forwarded_allow_ips: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS,...", help="Proxies whose X-Forwarded headers count; * is any."),
    ] = None,
    root_path: Annotated[str, typer.Option(help="The path under which a proxy shows the server.")] = "",
    open_page: Annotated[bool, typer.Option("--open", help="Open the playground in a browser.")] = False,
    dtype: DtypeOption = None,
    device: DeviceOption = "cpu",
    quantise: QuantiseOption = None,
) -> None:
    """Serve models over HTTP, as OpenAI's clients ask, with a page on which one watches them write.

    Ends with SIGTERM or Ctrl-C, once the requests under way are finished; at once with a second one.
    """
    require_choice("log", log, LOGS)
    named = _named(models or [])
    for _, where, revision in named:
        check_model_options(where, revision, dtype, device, quantise)
    keys = _keys(api_key_file)
    local = host in LOOPBACK
    if not local and not keys and not no_key:
        raise ColadaError(
            f"host={host} and no key, expected --api-key-file or {KEYS_VARIABLE}; --no-key lets anybody ask"
        )
    try:
        from colada.serve.admission import LOOPBACK_HOSTS, Limits, Policy
        from colada.serve.models import open_served
        from colada.serve.run import listen, run
    except ModuleNotFoundError as error:
        raise ColadaError(f"{error.name} is missing: pip install 'colada-lm[serve]'") from None

    os.environ.setdefault(*KERNELS)  # Read when torch is imported.
    limits = Limits(
        1 if reproducible else slots,
        max_waiting,
        capacity,
        max_context,
        max_tokens,
        max_steps,
        watchers,
        timeout,
        queue_timeout,
        reader=reader_timeout,
        ping=ping,
        drain=drain,
        stall=stall,
    )
    hosts = [*LOOPBACK_HOSTS, *(name.lower() for name in allowed_host or [])]
    if not allowed_host and (keys or not local):  # Other pages may know the name, not the key.
        hosts = ["*"]
    policy = Policy(keys, hosts, tuple(cors_origin or ()), metrics_public, log, log_prompts, max_connections)
    status = run(
        listen(host, port),
        lambda: [open_served(*one, dtype, device, quantise) for one in named],
        limits,
        policy,
        lenient=lenient,
        threads=threads,
        root_path=root_path,
        page=open_page,
        metrics_port=metrics_port,
        proxies=forwarded_allow_ips,
        read_keys=partial(_keys, api_key_file),
    )
    raise typer.Exit(status)


def _named(models: list[str]) -> list[tuple[str | None, str | None, str | None]]:
    """Return the name, place and revision of each model, None where there is none."""
    named: list[tuple[str | None, str | None, str | None]] = []
    for model in models:
        name, equals, where = ("", "", model) if Path(model).is_dir() else model.rpartition("=")
        place, _, revision = (where, "", "") if Path(where).exists() else where.partition("@")
        named.append((name if equals else None, place, revision or None))
    chat = [("colada-chat", "bundled-chat", None)] if BUNDLED_CHAT.is_dir() else []
    return named or [(None, None, None), *chat]


def _keys(path: Path | None) -> list[str]:
    """Return the keys of the environment and of a file, where # begins a comment."""
    lines = os.environ.get(KEYS_VARIABLE, "").split(",")
    if path is not None:
        lines += [line.partition("#")[0] for line in read_text(path, "keys, one a line").splitlines()]
    keys = [line.strip() for line in lines if line.strip()]
    if path is not None and not keys:
        raise ColadaError(f"{path} has no key, expected one a line")
    for key in keys:
        if not key.isascii() or not key.isprintable() or " " in key:
            raise ColadaError("a key has spaces or other than ASCII characters, expected none")
    return keys
