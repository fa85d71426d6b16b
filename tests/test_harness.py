"""The adapter, by the lm-evaluation-harness itself on small local tasks."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from typer.testing import CliRunner

import colada
from colada.cli.main import app
from colada.errors import ColadaError
from colada.models.cola import ColaDLM
from colada.models.likelihood import measure
from colada.models.load import MODELS
from colada.networks.config import DecoderConfig
from colada.networks.decoder import Decoder
from helpers import tiny_model

pytest.importorskip("lm_eval", reason="lm_eval is not installed (extra eval)")

if TYPE_CHECKING:
    from colada.evaluate.harness import HarnessLM

STORIES = ["Once upon a time there was a little girl.", "The dog ran home. He was happy."]
CHOICES = [
    {"context": "Once upon a time there was a little", "choices": ["girl", "very the"], "label": 0},
    {"context": "The dog ran", "choices": ["Lily said no", "home", "to the park"], "label": 2},
]
FILTERS = ["remove_whitespace", "take_first"]
FAST: dict[str, Any] = {"flow_steps": 1, "steps": 2, "batch_size": 3}


class Instance:
    """A request as the harness makes it."""

    def __init__(self, *args: Any) -> None:
        self.args = args


@pytest.fixture(scope="module")
def model() -> ColaDLM:
    return colada.load()


@pytest.fixture(scope="module")
def lm(model: ColaDLM) -> "HarnessLM":
    from colada.evaluate.harness import HarnessLM

    return HarnessLM(model, **FAST)


def run_task(
    lm: "HarnessLM", folder: Path, records: list[dict[str, Any]], **task: Any
) -> tuple[dict[str, Any], list[Any]]:
    """Return a local task's results, and what the harness got for each of its records."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    data = folder / "records.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    config = {
        "task": "local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        **task,
    }
    # JSON is YAML.
    (folder / "local.yaml").write_text(json.dumps(config))
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = simple_evaluate(model=lm, tasks=["local"], task_manager=manager, bootstrap_iters=0)
    assert found is not None
    samples = sorted(found["samples"]["local"], key=lambda sample: sample["doc_id"])
    return found["results"]["local"], [sample["resps"] for sample in samples]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "1")


# --- tasks ----------------------------------------------------------------------------------------


def test_multiple_choice(lm: "HarnessLM", model: ColaDLM, tmp_path: Path) -> None:
    results, responses = run_task(
        lm,
        tmp_path,
        CHOICES,
        output_type="multiple_choice",
        doc_to_text="{{context}}",
        doc_to_target="label",
        doc_to_choice="choices",
        metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
    )
    right, right_norm = 0, 0
    for record, own in zip(CHOICES, responses, strict=True):
        context = record["context"]
        values = []
        for choice, ((value, _),) in zip(record["choices"], own, strict=True):
            ids, before = model.ids(" " + choice), model.ids(context)
            assert before + ids == model.ids(f"{context} {choice}")
            seed = lm._seed("loglikelihood", context, " " + choice)
            values.append(measure(model, [ids], [before], steps=1, seed=[seed])[0].log_likelihood)
            assert value == pytest.approx(values[-1], rel=1e-4)
        right += values.index(max(values)) == record["label"]
        normed = [value / len(choice) for value, choice in zip(values, record["choices"], strict=True)]
        right_norm += normed.index(max(normed)) == record["label"]
    assert results["acc,none"] == right / 2
    assert results["acc_norm,none"] == right_norm / 2


def test_rolling(lm: "HarnessLM", model: ColaDLM, tmp_path: Path) -> None:
    results, responses = run_task(
        lm,
        tmp_path,
        [{"story": story} for story in STORIES],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{story}}",
        metric_list=[{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    )
    seeds = [lm._seed("loglikelihood_rolling", story, 0) for story in STORIES]
    bounds = [text.log_likelihood for text in measure(model, STORIES, steps=1, seed=seeds)]
    assert [own[0][0] for own in responses] == pytest.approx(bounds, rel=1e-4)
    words, size = (sum(len(part) for part in parts) for parts in (map(str.split, STORIES), STORIES))
    assert results["word_perplexity,none"] == pytest.approx(math.exp(-sum(bounds) / words), rel=1e-3)
    assert results["bits_per_byte,none"] == pytest.approx(-sum(bounds) / size / math.log(2), rel=1e-4)


def test_generate_until(lm: "HarnessLM", model: ColaDLM, tmp_path: Path) -> None:
    prompts = ["Once upon a time", "The dog ran", "Lily had a red"]
    settings = {"temperature": 0.0, "steps": 2, "stop": [".", "\n\n"]}
    seeds = [
        lm._seed(
            "generate_until",
            json.dumps([prompt, {"do_sample": False, "max_gen_toks": 12, "until": [".", "\n\n"]}]),
            0,
        )
        for prompt in prompts
    ]
    expected = [done.text for done in model.generate(prompts, 12, seed=seeds, **settings)]
    targets = [expected[0].strip(), "something else", expected[2].strip()]
    results, responses = run_task(
        lm,
        tmp_path,
        [{"prompt": prompt, "target": target} for prompt, target in zip(prompts, targets, strict=True)],
        output_type="generate_until",
        doc_to_text="{{prompt}}",
        doc_to_target="{{target}}",
        generation_kwargs={"until": [".", "\n\n"], "max_gen_toks": 12, "do_sample": False},
        filter_list=[
            {"name": "none", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}
        ],
        metric_list=[{"metric": "exact_match"}],
    )
    assert [own[0][0] for own in responses] == expected
    assert all("." not in text for text in expected)
    found = results["exact_match,none"]
    assert found == pytest.approx(sum(a.strip() == b for a, b in zip(expected, targets, strict=True)) / 3)
    assert found == pytest.approx(2 / 3)


def test_the_command_runs_the_harness(tmp_path: Path) -> None:
    data = tmp_path / "records.jsonl"
    data.write_text('{"story": "The dog ran home."}\n')
    config = {
        "task": "rolled",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{story}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    (tmp_path / "rolled.yaml").write_text(json.dumps(config))
    arguments = ["--tasks", "rolled", "--include_path", str(tmp_path), "--model_args", "flow_steps=1"]
    result = CliRunner().invoke(
        app, ["eval", "harness", *arguments, "--batch_size", "2", "--output_path", str(tmp_path / "out")]
    )
    assert result.exit_code == 0, result.output
    (file,) = (tmp_path / "out").rglob("results_*.json")
    record = json.loads(file.read_text())
    assert record["config"]["likelihood"] == {"kind": "bound", "samples": 1, "at": 0.6, "steps": 1}
    assert record["results"]["rolled"]["bits_per_byte,none"] > 0


# --- requests -------------------------------------------------------------------------------------


def test_neither_place_nor_batch_matter(model: ColaDLM, lm: "HarnessLM") -> None:
    from colada.evaluate.harness import HarnessLM

    alone = HarnessLM(model, **{**FAST, "batch_size": 1})
    pairs = [("The dog", " ran"), ("", "Once upon a time"), ("Once upon", " a time there was"), ("A", "")]
    forth = lm.loglikelihood([Instance(*pair) for pair in pairs])
    back = alone.loglikelihood([Instance(*pair) for pair in pairs[::-1]])[::-1]
    assert [value for value, _ in forth] == pytest.approx([value for value, _ in back], rel=1e-4)
    assert [greedy for _, greedy in forth] == [greedy for _, greedy in back]
    assert forth[3] == (0.0, True)
    drawn = {"until": ["."], "max_gen_toks": 6, "temperature": 1.0, "do_sample": True}
    asked = [Instance("The dog", drawn), Instance("A cat", {"max_new_tokens": 3}), Instance("The dog", drawn)]
    first = lm.generate_until(asked)
    assert alone.generate_until(asked) == first
    assert lm.generate_until(asked[:1]) == first[:1]
    assert first[0] != first[2]  # asked twice, drawn twice


def test_greedy_is_what_the_model_writes(model: ColaDLM, lm: "HarnessLM") -> None:
    context = "Once upon a time"
    seed = lm._seed("greedy", model.ids(context))
    (done,) = model.generate([context], 8, seed=[seed], steps=2, temperature=0.0, end_ids=())
    shorter = model.tokenizer.decode(done.tokens[:3]) if model.tokenizer is not None else ""
    texts = [done.text, shorter, shorter + "zz", " cat"]
    assert [model.ids(context + own)[len(model.ids(context)) :] for own in texts[:2]] == [
        list(done.tokens),
        list(done.tokens[:3]),
    ]
    found = lm.loglikelihood([Instance(context, own) for own in texts])
    assert [greedy for _, greedy in found] == [True, True, False, False]


def test_pairs_are_parted_where_every_character_counts_once(model: ColaDLM) -> None:
    from colada.evaluate.harness import split_pair

    tokenizer = model.tokenizer
    assert tokenizer is not None
    before, after = split_pair(tokenizer, "The dog ran ", "home")
    assert (tokenizer.decode(before), tokenizer.decode(after)) == ("The dog ran", " home")
    assert before + after == tokenizer.encode("The dog ran home")
    for context, continuation in (("The do", "g ran"), ("", "home"), ("Once upo", "n a time"), ("\n", "x")):
        before, after = split_pair(tokenizer, context, continuation)
        assert tokenizer.decode(before) + tokenizer.decode(after) == context + continuation
        assert before == tokenizer.encode(context.rstrip())


def test_long_texts_go_through_windows(model: ColaDLM) -> None:
    from colada.evaluate.harness import HarnessLM

    lm = HarnessLM(model, max_length=8, **FAST)
    ids = model.ids(STORIES[1])
    assert len(ids) > 8
    seeds = [lm._seed("loglikelihood_rolling", STORIES[1], at) for at in range(-(-len(ids) // 4))]
    texts = [ids[at : at + 4] for at in range(0, len(ids), 4)]
    bounds = measure(model, texts, [[], *texts[:-1]], steps=1, seed=seeds)
    (found,) = lm.loglikelihood_rolling([Instance(STORIES[1])])
    assert found == pytest.approx(sum(text.log_likelihood for text in bounds), rel=1e-4)
    (pair,) = lm.loglikelihood([Instance(STORIES[1], " Then")])
    new = model.ids(" Then")
    seed = lm._seed("loglikelihood", STORIES[1], " Then")
    alone = measure(model, [new], [ids[len(ids) + len(new) - 8 :]], steps=1, seed=[seed])[0]
    assert pair[0] == pytest.approx(alone.log_likelihood, rel=1e-4)
    with pytest.raises(ColadaError, match="at most max_length=8"):
        lm.generate_until([Instance("A", {"max_gen_toks": 9})])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_beams": 3}, "num_beams"),
        ({"max_gen_toks": 0}, "max_gen_toks=0"),
        ({"do_sample": True}, "temperature"),
        ({"do_sample": "yes"}, "do_sample='yes'"),
        ({"stop": ["."]}, "'until'"),
        ({"top_k": "many"}, "top_k='many'"),
    ],
)
def test_generation_arguments_are_refused_by_name(
    lm: "HarnessLM", arguments: dict[str, Any], words: str
) -> None:
    with pytest.raises(ColadaError, match=words):
        lm.generate_until([Instance("A", arguments)])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"batch_size": "auto"}, "batch_size='auto'"),
        ({"max_length": 1}, "max_length=1"),
        ({"steps": "many"}, "steps='many'"),
        ({"pretrained": "x"}, "unknown generation setting 'pretrained'"),
        ({"end_ids": []}, "end_ids"),
        ({"max_batch_size": 4}, "max_batch_size=4"),
    ],
)
def test_model_arguments_are_refused_by_name(model: ColaDLM, arguments: dict[str, Any], words: str) -> None:
    from colada.evaluate.harness import HarnessLM

    with pytest.raises(ColadaError, match=words):
        HarnessLM(model, **arguments)


def test_a_model_without_tokenizer_has_no_tasks() -> None:
    from colada.evaluate.harness import HarnessLM

    with pytest.raises(ColadaError, match=r"no tokenizer\.json"):
        HarnessLM(tiny_model())


# --- baselines ------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["ar", "llada"])
def test_a_baselines_answers_depend_on_the_request_alone(arch: str) -> None:
    from colada.evaluate.harness import HarnessLM

    tokenizer = colada.load().tokenizer
    assert tokenizer is not None
    shape = {"dim": 16, "num_layers": 2, "num_heads": 2, "ffn_dim": 24}
    config = DecoderConfig(objective=arch, vocab_size=tokenizer.vocab_size, init_std=0.5, **shape)
    decoder = Decoder(config)
    decoder.init_weights(torch.Generator().manual_seed(0))
    model = MODELS[arch](decoder, tokenizer)
    context = "Once upon a time"
    asked = []
    for length in (1, 2, 4):
        (made,) = model.generate([context], length, end_ids=())
        asked.append(Instance(context, made.text))
    asked.append(Instance(context, " there was a dog"))
    alone = [HarnessLM(model, batch_size=1).loglikelihood([own])[0] for own in asked]
    together = HarnessLM(model, batch_size=8).loglikelihood(asked)
    assert [greedy for _, greedy in together] == [greedy for _, greedy in alone]
    assert [value for value, _ in together] == pytest.approx([value for value, _ in alone], abs=1e-3)
    assert not together[3][1]
    with pytest.raises(ColadaError, match="has no guidance"):
        HarnessLM(model, guidance=3.0)
    with pytest.raises(ColadaError, match="samples=0" if arch == "llada" else "has no samples"):
        HarnessLM(model, samples=0)
