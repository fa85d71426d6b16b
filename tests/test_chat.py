"""Conversations: what is a prompt and what is learnt, and a model that has learnt some."""

import json
from pathlib import Path
from typing import Any

import pytest

import colada
from colada.errors import ColadaError
from colada.text.chat import (
    DEFAULT_TEMPLATE,
    PLAIN_TEMPLATE,
    encode_messages,
    encode_pair,
    read_template,
    render,
)
from colada.text.tokenizer import Tokenizer
from colada.train.inputs import chat_template
from colada.train.logs import read_samples
from colada.train.recipe import Recipe, load_recipe
from colada.train.trainer import Trainer
from runs import DEBUG

# As model hubs keep one for a model whose turns end with a token of its own spelling.
BRACKETS = """{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] + '; ' %}
    {%- set rest = messages[1:] %}
{%- else %}
    {%- set system = '' %}
    {%- set rest = messages %}
{%- endif %}
{%- for message in rest %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- '[Q] ' + (system if loop.first else '') + message['content'] + ' [A]' }}
    {%- else %}
        {{- ' ' + message['content'] | trim + eos_token }}
    {%- endif %}
{%- endfor %}"""


def said(*turns: str) -> list[dict[str, str]]:
    """A conversation of user and assistant in turn."""
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["user assistant system hello there you are " * 20], 270)


def parts(sample: tuple[list[int], int], tokenizer: Tokenizer) -> tuple[str, str]:
    """The prompt and the answer of a sample, as text."""
    ids, prompt = sample
    return tokenizer.decode(ids[:prompt], skip_special=False), tokenizer.decode(
        ids[prompt:], skip_special=False
    )


def test_every_answer_is_a_sample_with_all_before_it_as_prompt(tokenizer: Tokenizer) -> None:
    samples = encode_messages(said("hello", "hi you", "and?", "bye"), tokenizer, DEFAULT_TEMPLATE, "here")
    first = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    second = first + "hi you<|im_end|>\n<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n"
    assert [parts(sample, tokenizer) for sample in samples] == [
        (first, "hi you<|im_end|>"),
        (second, "bye<|im_end|>"),
    ]
    for ids, prompt in samples:
        assert ids[-1] in tokenizer.end_ids
        assert not set(ids[prompt:-1]) & set(tokenizer.end_ids)
        # As in generation, the prompt is tokenised alone.
        assert ids[:prompt] == tokenizer.encode(tokenizer.decode(ids[:prompt], skip_special=False))


def test_a_template_with_turns_of_its_own(tokenizer: Tokenizer) -> None:
    messages = [{"role": "system", "content": "be short"}, *said("hello", "  hi ", "and", "bye")]
    samples = encode_messages(messages, tokenizer, BRACKETS, "here")
    first = "[Q] be short; hello [A]"
    assert [parts(sample, tokenizer) for sample in samples] == [
        (first, " hi<|endoftext|>"),
        (first + " hi<|endoftext|>[Q] and [A]", " bye<|endoftext|>"),
    ]


def test_an_answer_whose_template_ends_it_with_no_end_token_gets_one(tokenizer: Tokenizer) -> None:
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    (sample,) = encode_messages(said("a", "b"), tokenizer, template, "here")
    assert parts(sample, tokenizer) == ("user: a\n", "assistant: b\n<|endoftext|>")


def test_a_pair_is_its_texts_and_an_end(tokenizer: Tokenizer) -> None:
    assert parts(encode_pair("hello ", "there", tokenizer, "here"), tokenizer) == (
        "hello ",
        "there<|endoftext|>",
    )
    assert encode_pair("", "there", tokenizer, "here")[1] == 0


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        (None, "messages is None, expected a list"),
        ([], r"messages is \[\], expected a list"),
        ("hello", "messages is 'hello', expected a list"),
        (["hello"], r"messages\[0\] is 'hello', expected an object"),
        ([{"role": "user"}], r"messages\[0\].content is None, expected a string"),
        ([*said("a"), {"role": 3, "content": "b"}], r"messages\[1\].role is 3, expected a string"),
        (
            [*said("a"), {"role": "asistant", "content": "b"}],
            r"messages\[1\].role='asistant', expected one of 'system', .*\(did you mean 'assistant'\?\)",
        ),
        (said("a", "  "), r"messages\[1\].content is empty, expected an answer"),
        (said("a"), "no message has the role 'assistant'"),
        (said("a<|im_end|>", "b"), r"messages\[0\].content spells the special token '<\|im_end\|>'"),
        (said("a", "b<|endoftext|>"), r"messages\[1\].content spells the special token"),
    ],
)
def test_a_bad_conversation_is_named_in_one_line(tokenizer: Tokenizer, messages: Any, words: str) -> None:
    with pytest.raises(ColadaError, match=rf"^chats\.jsonl:7: {words}") as caught:
        encode_messages(messages, tokenizer, DEFAULT_TEMPLATE, "chats.jsonl:7")
    assert "\n" not in str(caught.value)


def test_what_a_template_refuses_is_named(tokenizer: Tokenizer) -> None:
    twice = [*said("a"), *said("b", "c")]
    with pytest.raises(ColadaError, match=r"^here: the chat template refuses it: roles must alternate$"):
        encode_messages(twice, tokenizer, BRACKETS, "here")
    with pytest.raises(ColadaError, match=r"^here: .*adds nothing for the answer messages\[1\]"):
        encode_messages(said("a", "b"), tokenizer, "hello", "here")
    moody = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ColadaError, match=r"here: .*renders messages\[1\] in another way than its prompt"):
        encode_messages(said("a", "b"), tokenizer, moody, "here")


@pytest.mark.parametrize(
    ("prompt", "completion", "words"),
    [(3, "a", "prompt is 3"), ("a", None, "completion is None"), ("a", "", "completion is empty")],
)
def test_a_bad_pair_is_named(tokenizer: Tokenizer, prompt: object, completion: object, words: str) -> None:
    with pytest.raises(ColadaError, match=f"^here: {words}"):
        encode_pair(prompt, completion, tokenizer, "here")


def test_text_that_cannot_be_encoded_is_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(ColadaError, match=r"^chats\.jsonl:7: text holds a lone surrogate"):
        encode_messages(said("a\ud800", "b"), tokenizer, DEFAULT_TEMPLATE, "chats.jsonl:7")
    with pytest.raises(ColadaError, match=r"^chats\.jsonl:7: text holds a lone surrogate"):
        encode_pair("a", "b\ud800", tokenizer, "chats.jsonl:7")


@pytest.mark.parametrize("end", ["<|endoftext|>", "<|im_end|>"])
def test_a_completion_has_one_end_and_a_prompt_any_tokens(tokenizer: Tokenizer, end: str) -> None:
    with pytest.raises(ColadaError, match=r"^here: completion spells an end token"):
        encode_pair("a", f"b{end}", tokenizer, "here")
    assert parts(encode_pair(f"a{end}", "b", tokenizer, "here"), tokenizer) == (f"a{end}", "b<|endoftext|>")


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 // (messages | length - 1) }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{{ messages[0]['content'].index('absent') }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ raise_exception('two\nlines') }}",
        "{{ messages[1]['content'] }}",
    ],
)
def test_a_template_that_fails_says_so_in_one_line(tokenizer: Tokenizer, template: str) -> None:
    with pytest.raises(ColadaError, match=r"^here: the chat template refuses it: ") as caught:
        render(said("a"), tokenizer, template, "here", answer=True)
    assert "\n" not in str(caught.value)


def test_templates_find_what_model_hubs_give_them(tokenizer: Tokenizer) -> None:
    learnt = "{% for m in messages %}{% if m.role == 'user' %}Q {{ m.content }}\nA {% else %}"
    learnt += "{% generation %}\n{{ m.content }}{{ eos_token }}{% endgeneration %}\n{% endif %}{% endfor %}"
    (sample,) = encode_messages(said("a", "b"), tokenizer, learnt, "here")
    assert parts(sample, tokenizer) == ("Q a\nA ", "b<|endoftext|>")
    stopping = (
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}"
    )
    assert render(said("a", "b"), tokenizer, stopping, "here", answer=True) == "a"
    written = "{{ messages[0] | tojson(ensure_ascii=False) }}"
    turn = '{"role": "user", "content": "é<&"}'
    assert render(said("é<&"), tokenizer, written, "here", answer=True) == turn
    year = render(said("a"), tokenizer, "{{ strftime_now('%Y') }}", "here", answer=True)
    assert year.isdigit()
    assert len(year) == 4


def test_a_template_cannot_reach_out_of_its_sandbox(tokenizer: Tokenizer) -> None:
    with pytest.raises(ColadaError, match="the chat template refuses it"):
        encode_messages(said("a", "b"), tokenizer, "{{ ''.__class__.__mro__ }}", "here")


def test_a_file_that_is_no_template_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text("{% for m in %}")
    with pytest.raises(ColadaError, match=r"own\.jinja is not a chat template"):
        read_template(tmp_path / "own.jinja")
    with pytest.raises(ColadaError, match=r"absent\.jinja"):
        read_template(tmp_path / "absent.jinja")


def test_where_roles_are_words_turns_follow_one_another_and_answers_end(tokenizer: Tokenizer) -> None:
    samples = encode_messages(said("hello", "hi you", "and?", "bye"), tokenizer, PLAIN_TEMPLATE, "here")
    first = "User:\nhello\nAssistant:\n"
    second = first + "hi you<|endoftext|>\nUser:\nand?\nAssistant:\n"
    for (ids, start), (prompt, answer) in zip(samples, [(first, "hi you"), (second, "bye")], strict=True):
        assert tokenizer.decode(ids[:start], skip_special=False) == prompt
        assert ids[start:] == [*tokenizer.encode(answer), tokenizer.eos_id]


def _recipe_of_chats(tmp_path: Path, *overrides: str) -> Recipe:
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": said("a", "b")}) + "\n")
    source = f"data.sources=[{{path: {tmp_path / 'chats.jsonl'}, format: messages}}]"
    return load_recipe(DEBUG, [source, "data.packing=samples", *overrides])


def test_without_tokens_for_chatml_roles_are_words(tokenizer: Tokenizer, tmp_path: Path) -> None:
    plain = json.loads(tokenizer.to_json())
    plain["added_tokens"] = [own for own in plain["added_tokens"] if "im_" not in own["content"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(plain))
    recipe = _recipe_of_chats(tmp_path)
    assert chat_template(recipe, Tokenizer.from_file(tmp_path / "tokenizer.json"), None) == PLAIN_TEMPLATE
    assert chat_template(recipe, tokenizer, None) == DEFAULT_TEMPLATE


def test_answers_end_with_what_a_frozen_text_vae_spells(tmp_path: Path) -> None:
    model = colada.load()
    assert model.tokenizer is not None
    end = model.tokenizer.id_of("<|im_end|>")
    assert end is not None
    assert model.decode(model.encode([end])) != [end]  # Its text had none.
    frozen = "stages={instruct: {steps: 1}}"
    recipe = _recipe_of_chats(tmp_path, "model={init: bundled}", frozen)
    assert chat_template(recipe, model.tokenizer, model) == PLAIN_TEMPLATE
    learnt = _recipe_of_chats(
        tmp_path, "model={init: bundled}", "stages={vae: {steps: 1}, instruct: {steps: 1}}"
    )
    assert chat_template(learnt, model.tokenizer, model) == DEFAULT_TEMPLATE
    (tmp_path / "chatml.jinja").write_text(DEFAULT_TEMPLATE)
    recipe = _recipe_of_chats(
        tmp_path, "model={init: bundled}", frozen, f"data.chat_template={tmp_path / 'chatml.jinja'}"
    )
    with pytest.raises(ColadaError, match=r"ends answers with '<\|im_end\|>', which the Text VAE of model"):
        chat_template(recipe, model.tokenizer, model)


# --- a model that has learnt four answers --------------------------------------------------------

ANSWERS = {"ping": "pong", "red": "rose", "sun": "moon", "cat": "mouse"}


@pytest.fixture(scope="module")
def answering(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in which the debug recipe's networks learn four conversations by heart."""
    out = tmp_path_factory.mktemp("chat")
    lines = (json.dumps({"messages": said(*pair)}) for pair in ANSWERS.items())
    (out / "chats.jsonl").write_text("\n".join(lines) + "\n")
    overrides = [
        f"data.sources=[{{path: {out / 'chats.jsonl'}, format: messages}}]",
        "data.packing=samples",
        "data.validation_share=0",
        "tokenizer.vocab_size=262",
        "model.dit.prediction=z0",
        *(f"stages.{name}.{setting}" for name in ("vae", "prior") for setting in ("length=48", "batch=4")),
        "stages.prior.steps=300",
        "stages.prior.lr=0.004",
        "run.validate_every=0",
        "run.sample_every=300",
        "run.sample_prompts=[red]",
        "run.save_every=1000",
        "run.report=false",
        "generation.guidance=1.0",
    ]
    Trainer(load_recipe(DEBUG, overrides), out / "run").run()
    return out / "run" / "model"


@pytest.mark.slow
def test_answers_are_learnt_and_so_is_where_they_end(answering: Path) -> None:
    model = colada.load(answering)
    assert model.chat_template == DEFAULT_TEMPLATE
    for question, answer in ANSWERS.items():
        done = model.chat(said(question), 30, seed=1)
        assert (done.text, done.finish_reason) == (answer, "end")
        written = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        assert model.generate([written], 30, seed=1)[0] == done


@pytest.mark.slow
def test_the_samples_of_a_run_are_answers(answering: Path) -> None:
    sample = {"stage": "prior", "step": 300, "title": "red", "text": "red|rose"}
    assert read_samples(answering.parent / "samples.jsonl") == [sample]


@pytest.mark.slow
def test_the_template_goes_where_the_model_goes(answering: Path, tmp_path: Path) -> None:
    model = colada.load(answering)
    model.save(tmp_path / "copy")
    assert colada.load(tmp_path / "copy").chat_template == DEFAULT_TEMPLATE
    model.chat_template = None
    model.save(tmp_path / "copy")
    again = colada.load(tmp_path / "copy")
    with pytest.raises(ColadaError, match=r"has no chat template \(chat_template\.jinja\)"):
        again.chat(said("ping"))
    with pytest.raises(ColadaError, match=r"^chat: messages\[0\].content spells"):
        colada.load(answering).chat(said("<|im_end|>"))


@pytest.mark.slow
def test_the_command_line_prints_the_answer_alone(
    answering: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from colada.cli.main import main

    where = ["--model", str(answering), "--chat"]
    assert main(["generate", "sun", *where]) == 0
    assert capsys.readouterr().out == "moon\n"
    (tmp_path / "several.txt").write_text("ping\nred\n")
    assert main(["generate", "--file", str(tmp_path / "several.txt"), *where]) == 0
    assert capsys.readouterr().out == "pong\n\nrose\n"
    assert main(["generate", "cat", *where, "--json"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert (line["prompt"], line["text"]) == ("cat", "mouse")
