"""Recipes: what is read and refused, and what follows from one."""

import itertools
import math
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

import make_stories
from colada.data.sources import Source
from colada.errors import ColadaError
from colada.randomness import generator_of
from colada.train.kinds import KINDS, JointSection, PriorSection, StageSection, TextVAESection
from colada.train.noise import timestep_law
from colada.train.optimisation import average_weights, learning_rate, make_optimisers
from colada.train.plan import plan_run, resolve
from colada.train.recipe import (
    Recipe,
    commented,
    difference,
    load_recipe,
    save_recipe,
    source_weights,
)
from helpers import tiny_dit, tiny_vae
from runs import DEBUG, ROOT, recipe

# --- the corpus and the recipes -----------------------------------------------------------------


def test_the_corpus_is_what_its_script_writes() -> None:
    text = make_stories.STORIES.read_text(encoding="utf-8")
    assert text == make_stories.corpus()
    assert len(text.encode()) < 150_000


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_valid_and_reads_back_the_same(path: Path, tmp_path: Path) -> None:
    loaded = load_recipe(path)
    save_recipe(loaded, tmp_path / "again.yaml")
    assert load_recipe(tmp_path / "again.yaml") == loaded
    loaded.configs(loaded.tokenizer.vocab_size, 1)


def test_overrides_are_yaml_values(tmp_path: Path) -> None:
    made = load_recipe(
        DEBUG, ["stages.vae.lr=1e-3", "stages.prior.loc=null", "run.sample_prompts=[a, b]", "seed=7"]
    )
    assert (made.stages["vae"].lr, made.stages["prior"].loc, made.seed) == (0.001, None, 7)
    assert made.run.sample_prompts == ("a", "b")
    assert load_recipe(DEBUG, ["data.sources.0.path=elsewhere"]).data.sources[0].path == "elsewhere"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages:\n  vae: {stpes: 3}\n", r"unknown key 'stages.vae.stpes' \(did you mean 'steps'\?\)"),
        ("stage:\n  steps: 3\n", r"unknown key 'stage' \(did you mean 'stages'\?\)"),
        ("stages:\n  vae: {steps: many}\n", r"stages.vae.steps='many'.*integer"),
        ("stages:\n  vae: {steps: 2.5}\n", r"stages.vae.steps=2.5.*integer"),
        (
            "stages:\n  prior: {kind: thawed}\n",
            r"prior.kind='thawed', expected one of 'vae', 'prior', 'instruct', 'joint'",
        ),
        ("stages:\n  decay: {steps: 3}\n", r"stages: decay has no kind, expected one of 'vae', 'prior'"),
        ("stages:\n  Decay: {kind: prior}\n", r"stages: 'Decay', expected a name of small letters"),
        ("stages:\n  decoder: {steps: 3}\n", r"stages: decoder, expected one of kind vae, prior, instruct"),
        (
            "stages:\n  prior: {weights: {books: 1}}\n",
            r"stages.prior.weights: 'books' names none of the sources",
        ),
        ("stages:\n  prior: {weights: {data: 0}}\n", r"stages.prior.weights=.*expected one above 0"),
        (
            "stages:\n  distil: {trajectories: {solver: huen}}\n",
            r"solver: 'huen', expected one of 'euler', 'ab2', 'heun' \(did you mean 'heun'\?\)",
        ),
        ("stages:\n  joint: {interval: [0, 3]}\n", r"stages.joint.interval.0=0.*greater than or equal to 1"),
        ("data:\n  sources: [{pth: x}]\n", r"unknown key 'data.sources.0.pth' \(did you mean 'path'\?\)"),
        ("data:\n  sources: []\n", r"data.sources"),
        (
            "data:\n  sources: [{path: x, format: pairs}]\n",
            r"data: packing='stream' with format='pairs' of x, expected 'samples'",
        ),
        ("model:\n  init: x\n  vae: {dim: 3}\n", r"model: init gives the configurations"),
        ("stages:\n  vae: {lr: -1}\n", r"stages.vae.lr=-1.*greater than"),
        ("stages:\n  vae: {betas: [0.9]}\n", r"stages.vae.betas"),
        ("stages: 3\n", r"stages=3"),
        ("run:\n  log_every: 0\n", r"run.log_every=0"),
        ("stage1: [1, 2\n", r"not valid YAML"),
        ("a: b: c\n", r"not valid YAML"),
        ("\t- x\n", r"not valid YAML"),
        ("- stage1\n", r"holds a list"),
        ("just words\n", r"holds a str"),
    ],
)
def test_a_bad_recipe_is_refused_in_one_line_that_names_file_and_key(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(ColadaError, match=message) as caught:
        load_recipe(path)
    assert "own.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_recipe_that_cannot_be_read_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ColadaError, match=r"absent\.yaml.*no such file"):
        load_recipe(tmp_path / "absent.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"seed: \xff\n")
    with pytest.raises(ColadaError, match=r"latin\.yaml"):
        load_recipe(tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    "override",
    [
        "stages.vae.steps",
        "seed.x=1",
        "stages.vae.steps=[1",
        "stages.vae.stepz=1",
        "data.sources.1.path=x",
        "data.sources.x.path=x",
    ],
)
def test_a_bad_override_is_refused(override: str) -> None:
    with pytest.raises(ColadaError) as caught:
        load_recipe(DEBUG, [override])
    assert "\n" not in str(caught.value)


# --- formulas -----------------------------------------------------------------------------------


def test_the_learning_rate_warms_up_and_follows_half_a_cosine() -> None:
    section = StageSection(steps=12, warmup=4, final_lr=0.1)
    made = [learning_rate(step, section) for step in range(15)]
    quarter = 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2
    assert made[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert made[6] == pytest.approx(quarter)
    assert made[8] == pytest.approx(0.55)
    assert made[10] == pytest.approx(1.1 - quarter)
    assert made[11:] == pytest.approx([0.1] * 4)
    assert all(a > b for a, b in itertools.pairwise(made[4:12]))
    assert learning_rate(0, StageSection(steps=5, warmup=0)) == 1.0


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
def test_every_parameter_has_one_optimiser_and_vectors_are_not_decayed(optimiser: str) -> None:
    section = TextVAESection(optimiser=optimiser, weight_decay=0.3)
    for network in (tiny_vae(), tiny_dit()):
        groups = [g for opt in make_optimisers(network, section, 0.1) for g in opt.param_groups]
        held = [parameter for group in groups for parameter in group["params"]]
        assert len(held) == len({id(p) for p in held})
        assert {id(p) for p in held} == {id(p) for p in network.parameters()}
        for group in groups:
            for parameter in group["params"]:
                assert group["weight_decay"] == (0.3 if parameter.ndim > 1 else 0.0)


def test_averaged_weights_follow_their_recursion() -> None:
    network = nn.Linear(1, 1, bias=False)
    average = average_weights(network, 0.4)
    expected = None
    for n, weight in enumerate([1.0, -2.0, 5.0, 0.5, 3.0, 8.0, -1.0]):
        network.weight.data.fill_(weight)
        average.update_parameters(network)
        # The first weights are taken over, then the decay is 2/11, 3/12, 4/13, ... up to 0.4.
        decay = min(0.4, (1 + n) / (10 + n))
        expected = weight if expected is None else decay * expected + (1 - decay) * weight
        assert float(average.module.weight.detach()) == pytest.approx(expected, rel=1e-5)


def test_each_row_of_each_stage_has_its_own_noise() -> None:
    draws = {
        (seed, stage, row): float(torch.randn((), generator=generator_of(seed, stage, row)))
        for seed in range(3)
        for stage in (1, 2)
        for row in range(20)
    }
    assert len(set(draws.values())) == len(draws)
    assert float(torch.randn((), generator=generator_of(2, 1, 7))) == draws[2, 1, 7]


def test_wsd_is_constant_and_then_goes_down_in_a_line() -> None:
    section = StageSection(steps=20, warmup=4, final_lr=0.2, schedule="wsd", decay=0.25)
    made = [learning_rate(step, section) for step in range(21)]
    assert made[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert made[4:15] == [1.0] * 11
    assert made[15:] == pytest.approx([0.84, 0.68, 0.52, 0.36, 0.2, 0.2])


def test_a_constant_learning_rate_stays_after_its_warm_up() -> None:
    section = StageSection(steps=6, warmup=2, final_lr=0.2, schedule="constant")
    assert [learning_rate(step, section) for step in range(7)] == [0.5, 1, 1, 1, 1, 1, 1]


def test_other_text_than_the_recipes_takes_the_weights_of_its_sources_away() -> None:
    tiny = ROOT / "recipes/tiny.yaml"
    assert load_recipe(tiny).stages["decay"].weights == {"tinystories": 0.85, "picture_books": 0.15}
    mine = load_recipe(tiny, [], {"data.sources": [{"path": "my-texts"}]})
    assert [source.path for source in mine.data.sources] == ["my-texts"]
    assert mine.stages["decay"].weights is None


def test_the_judge_reads_what_the_bundled_model_reads() -> None:
    tiny, judge = (load_recipe(ROOT / f"recipes/{name}.yaml") for name in ("tiny", "judge"))
    assert judge.data == tiny.data
    assert judge.tokenizer == tiny.tokenizer
    matched = tiny.model_copy(update={"model": tiny.model.model_copy(update={"arch": "ar"})})
    assert plan_run(judge).cost.parameters == plan_run(matched).cost.parameters
    names = ("dim", "num_layers", "num_heads", "ffn_dim")
    shapes = [[resolve(own).model.decoder[name] for name in names] for own in (judge, matched)]
    assert shapes[0] == shapes[1]


def test_intervals_take_turns_and_begin_with_joint_steps() -> None:
    two = recipe("stages.prior.kind=joint", "stages.prior.interval=[2, 3]").stages["prior"]
    assert isinstance(two, JointSection)
    assert [two.joint_at(step) for step in range(7)] == [True, True, False, False, False, True, True]
    assert all(JointSection().joint_at(step) for step in range(3))


def test_an_unset_loc_follows_the_latent_width() -> None:
    assert timestep_law(PriorSection(), 64).loc == pytest.approx(1 + 0.5 * math.log(4))
    assert timestep_law(PriorSection(loc=1.5), 64).loc == 1.5


def test_every_key_has_a_comment_and_is_written() -> None:
    stages = {name: {} for name in KINDS} | {"drawing": {"kind": "pictures"}}  # What reads the picture VAE.
    sources = [{"path": name, "format": name} for name in ("text", "preferences", "tasks")]
    data = {"pictures": [{"path": "shapes:"}], "sources": sources, "packing": "samples"}
    model = {"image": {"kind": "conv_vae"}}
    text = commented(Recipe.model_validate({"stages": stages, "data": data, "model": model}))

    def check(section: type, values: dict) -> None:
        assert values.keys() == section.model_fields.keys()
        for name, field in section.model_fields.items():
            inner = field.annotation
            if isinstance(inner, type) and hasattr(inner, "model_fields"):
                check(inner, values[name])
            elif name not in ("sources", "kind"):
                assert field.description
                assert " ".join(field.description.split()[:4]) in text

    written = yaml.safe_load(text)
    check(Recipe, written)
    assert list(written["stages"]) == list(stages)
    for name, section in KINDS.items():
        check(section, written["stages"][name])


def test_stages_keep_their_numbers_whatever_is_left_out() -> None:
    """The seeds of rows and noise have them: a prior alone draws what it does after a Text VAE."""

    def numbers(*stages: str) -> list[int]:
        made = Recipe.model_validate({"stages": {name: {"kind": name.strip("_23")} for name in stages}})
        return [made.number(name) for name in stages]

    assert numbers("vae", "prior", "prior_3") == [1, 2, 3]
    assert numbers("prior") == numbers("joint") == [2]
    assert numbers("prior", "vae") == [2, 3]
    assert load_recipe(DEBUG, ["model.arch=ar"]).number("decoder") == 1


def test_a_stage_reads_the_sources_that_it_weighs() -> None:
    sources = (Source(path="data/tiny.parquet", weight=3), Source(hub="a/Books"), Source(path="b/tiny.txt"))
    assert source_weights(PriorSection(), sources) == [3, 1, 1]
    named = PriorSection(weights={"data/tiny.parquet": 2, "Books": 0.5})
    assert source_weights(named, sources) == [2, 0.5, 0]
    with pytest.raises(ColadaError, match="'tiny' names 2 of the sources"):
        source_weights(PriorSection(weights={"tiny": 1}), sources)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stages.prior.lr=0.5", r"stages\.prior\.lr was 0\.008 and is now 0\.5"),
        ("seed=1", "seed was 0 and is now 1"),
        ("data.sources.0.weight=2", r"data\.sources\.0\.weight was 1\.0 and is now 2\.0"),
        ("data.packing=samples", "data.packing was 'stream' and is now 'samples'"),
    ],
)
def test_the_difference_of_two_recipes_is_what_changes_the_run(override: str, words: str) -> None:
    import re

    assert re.fullmatch(words, str(difference(recipe(), recipe(override))))


@pytest.mark.parametrize(
    "override", ["run.log_every=5", "generation.guidance=3", "data.workers=3", "stages.vae.micro_batch=2"]
)
def test_what_changes_no_result_is_no_difference(override: str) -> None:
    assert difference(recipe(), recipe(override)) is None
