"""Stages that learn from rewards of what the model writes."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import colada
import rules
from answers import made, rewarding
from colada.data.rows import Batch
from colada.data.rows import batch as batch_of
from colada.device import plain_torch
from colada.errors import ColadaError
from colada.generate.engine.engine import Engine
from colada.generate.settings import TextRequest
from colada.models.autoregressive import AutoregressiveLM
from colada.models.cola import ColaDLM
from colada.models.likelihood import measure
from colada.models.rollouts import roll_out
from colada.networks.config import DecoderConfig
from colada.networks.decoder import Decoder
from colada.text.transcript import Completion
from colada.train import rewards
from colada.train.cost import position_entries
from colada.train.decoder_losses import MaskNoise, decoder_loss
from colada.train.kinds import RaftSection, RewardSection
from colada.train.parallel import Ranks
from colada.train.plan import plan_run
from colada.train.preflight import preflight
from colada.train.rewards import Answer, AnswerNoise, RaftStage, RewardStage, RolloutStage, plain_prompt
from colada.train.stages import Beginning, Stage, make_stage
from colada.train.trainer import Interrupted, Trainer
from helpers import reference, request, tiny_model
from runs import STORIES, At, assert_same_run, logged, metrics, same


def test_what_is_learnt_of_groups_by_hand() -> None:
    groups = [[0.0, 1.0, 0.0, 0.0], [0.5, 0.5, 0.5, 0.5], [0.25, 0.75, 0.25, 0.75]]
    empty = Batch(torch.zeros(1, 4).long())
    answers = [[Answer(empty, torch.zeros(4, 2), worth, 0.0, True, 4) for worth in group] for group in groups]
    for margin, rewarded in ((0.5, [1.0, 0.75]), (1.0, [1.0, 0.75]), (1.5, [1.0]), (2.0, [])):
        stage: Any = SimpleNamespace(section=RaftSection(margin=margin))
        learnt = RaftStage.chosen(stage, answers)
        assert [(own.reward, own.share) for own in learnt] == [(worth, 1.0) for worth in rewarded]
    stage = SimpleNamespace(section=RewardSection())
    learnt = RewardStage.chosen(stage, answers)
    assert [own.reward for own in learnt] == [*groups[0], *groups[2]]  # Equal ones teach nothing.
    assert [own.share for own in learnt[4:]] == [0.0, 1.0, 0.0, 1.0]
    assert [RewardStage.keep(stage, n) for n in (0, 1, 100, 1000)] == [0.0, 0.001, 0.1, 0.5]
    assert RaftStage.keep(stage, 7) == 0.0


@pytest.fixture(scope="module")
def rewarded_run(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rewarded")
    rules.asked.clear()
    Trainer(rewarding(start, folder), folder / "run").run()
    return folder / "run"


def test_rewards_are_of_what_users_ask(rewarded_run: Path) -> None:
    assert len(rules.asked) == 3 * 2 * 3  # Rounds, prompts, answers.
    assert not any("<|" in prompt or "\n" in prompt for prompt in rules.asked)
    training = [record for record in metrics(rewarded_run) if record["split"] == "train"]
    assert all(0 < record["reward"] < 1 and record["push"] > 0 for record in training)
    assert training[0]["drift"] == training[0]["pull"] == 0
    assert training[-1]["drift"] > 0


@pytest.mark.parametrize("kind", ["reward", pytest.param("raft", marks=pytest.mark.slow)])
def test_a_run_that_is_stopped_in_a_round_ends_in_the_same_weights(
    start: Path, rewarded_run: Path, tmp_path: Path, kind: str
) -> None:
    whole, judge = rewarded_run, list[str]()
    if kind == "raft":
        whole = tmp_path / "whole"
        judge.append(f"stages.raft.judge={start}")
        Trainer(rewarding(start, tmp_path, *judge, kind=kind), whole).run()
    for step in (1, 2):  # In a round, and between two.
        out = tmp_path / str(step)
        with pytest.raises(Interrupted):
            Trainer(rewarding(start, tmp_path, *judge, kind=kind), out, At(kind, step)).run()
        Trainer(rewarding(start, tmp_path, *judge, kind=kind), out).run()
        assert_same_run(out, whole)


def steps_of(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Batch, AnswerNoise]]:
    """What steps will learn from, as they come."""
    came: list[tuple[Batch, AnswerNoise]] = []
    step = Trainer._step

    def kept(self: Trainer, stage: Stage, number: int, rows: Batch, noise: Any) -> Any:
        came.append((rows, noise))
        return step(self, stage, number, rows, noise)

    monkeypatch.setattr(Trainer, "_step", kept)
    return came


def test_blocks_after_the_one_that_met_the_rule_have_an_even_share(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    came = steps_of(monkeypatch)
    some = ["reward=rules:vowels", "credit=until_met", "new_tokens=24", "samples=8", "prompts=4", "steps=4"]
    Trainer(rewarding(start, tmp_path, *(f"stages.reward.{own}" for own in some)), tmp_path / "run").run()
    tokenizer = colada.load(start).tokenizer
    assert tokenizer is not None
    later = whole = 0
    for rows, noise in came:
        assert rows.trained is not None
        assert noise.written is not None
        assert noise.share is not None
        for row in noise.written.nonzero().flatten().tolist():
            first = int(rows.trained[row].int().argmax())
            end = int(rows.trained[row].sum()) + first
            share, ids = noise.share[row], rows.ids[row]
            counts = []
            for stop in range(first // 4 * 4 + 4, end + 1, 4):
                written = ids[first:stop].tolist()
                ended = [n for n, token in enumerate(written) if token in tokenizer.end_ids]
                text = tokenizer.decode(written[: ended[0]] if ended else written)
                counts.append(len(set(text) & set("aeiou")))
            met = next((n for n, count in enumerate(counts) if count == counts[-1] > 0), len(counts) - 1)
            stop = first // 4 * 4 + 4 * (met + 1)
            assert len(set(share[:stop].tolist())) == 1
            assert set(share[stop:end].tolist()) <= {0.5}
            later += stop < end and float(share[0]) != 0.5
            whole += stop >= end
    assert later > 5
    assert whole > 0


def test_an_engine_whose_passes_are_replayed_serves_all_rounds(
    start: Path, rewarded_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, with the weights of each round."""
    engines: list[Engine] = []

    def engine(self: ColaDLM, capacity: int, slots: int | None, pad_id: int) -> Engine:
        with plain_torch(inference=False):
            made = Engine(self.vae, self.dit, capacity=1024, slots=slots, pad_id=pad_id, bucket=8)
        engines.append(made)
        return made

    monkeypatch.setattr(ColaDLM, "_engine", engine)
    Trainer(rewarding(start, tmp_path), tmp_path / "run").run()
    assert len(engines) == 1
    for record, again in zip(logged(rewarded_run), logged(tmp_path / "run"), strict=True):
        for key in {"loss", "push", "drift", "reward"} & record.keys():
            assert again[key] == pytest.approx(record[key], rel=1e-3, abs=1e-5)


def test_answers_to_a_prompt_follow_each_other_with_one_noise(start: Path, tmp_path: Path) -> None:
    run = rewarding(start, tmp_path, "stages.reward.prompts=4", "stages.reward.batch=8")
    trainer = Trainer(run, tmp_path / "run")
    stage = make_stage(trainer.system, "reward", trainer._lay_out)
    assert isinstance(stage, RolloutStage)
    rows_from = partial(trainer.inputs.rows, "train", stage.section, block=4)
    more: Any = (trainer._whole, trainer._model, Ranks(0, 1, torch.device("cpu")), trainer.display)
    stage.begin(Beginning(rows_from, [], *more, lambda: False))
    size, numbers = stage.section.samples, range(8)
    steps = [stage.rollouts(step, batch_of(rows_from(3), numbers), stage.draw(numbers)) for step in (0, 1)]
    trainer._unlock()
    answers: list[tuple[list[int], torch.Tensor]] = []
    for rows, drawn in steps:
        assert drawn.z1 is not None
        assert rows.trained is not None
        prompts = [
            ids[: int(free.int().argmax())].tolist() for ids, free in zip(rows.ids, rows.trained, strict=True)
        ]
        answers += list(zip(prompts, drawn.z1, strict=True))[:8]
    groups = [answers[at : at + size] for at in range(0, len(answers), size)]
    for group in groups:
        assert all(prompt == group[0][0] and torch.equal(z1, group[0][1]) for prompt, z1 in group)
    assert len({float(group[0][1].sum()) for group in groups}) == len(groups) > 1


@pytest.mark.parametrize("batch", [4, 8])
def test_rows_that_are_replayed_do_not_depend_on_the_ranks(start: Path, tmp_path: Path, batch: int) -> None:
    made_of: dict[int, list[tuple[float, ...]]] = {}
    for size in (1, 2, 4):
        replayed, counts = list[tuple[float, ...]](), set[int]()
        for rank in range(size):
            run = rewarding(start, tmp_path, "stages.reward.prompts=4", f"stages.reward.batch={batch}")
            ranks = Ranks(rank, size, torch.device("cpu"))
            trainer = Trainer(run, tmp_path / f"{batch}-{size}-{rank}")
            stage = make_stage(trainer.system, "reward", trainer._lay_out)
            assert isinstance(stage, RolloutStage)
            rows_from = partial(trainer.inputs.rows, "train", stage.section, block=4)
            more: Any = (trainer._whole, trainer._model, ranks, trainer.display, lambda: False)
            stage.begin(Beginning(rows_from, [], *more))
            numbers = ranks.share(batch)
            own, noise = batch_of(rows_from(3), numbers), stage.draw(numbers)
            rows, drawn = stage.rollouts(0, own, noise)
            trainer._unlock()
            counts.add(len(rows))
            _, others = stage._parts(rows, drawn)
            assert drawn.z1 is not None
            for row in range(len(rows)):
                if bool(others[row].any()):
                    first = drawn.z1[row].flatten()[:3].tolist()
                    replayed.append((*first, *rows.ids[row].tolist(), int(others[row].sum())))
        assert len(counts) == 1  # Else sharded ranks would wait for each other.
        made_of[size] = sorted(replayed)
    assert len(made_of[1]) == batch // 4
    assert made_of[1] == made_of[2] == made_of[4]


def test_an_answer_that_does_not_end_is_worth_less(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every second one does, whatever it says."""
    came, write = steps_of(monkeypatch), rewards.roll_out

    def some_end(*args: Any) -> list[Completion]:
        done = write(*args)
        reasons = ("end", "length") * len(done)
        return [replace(own, finish_reason=reason) for own, reason in zip(done, reasons, strict=False)]

    monkeypatch.setattr(rewards, "roll_out", some_end)
    some = ["reward=rules:equal", "unended=0.125", "samples=4", "steps=1"]
    Trainer(rewarding(start, tmp_path, *(f"stages.reward.{own}" for own in some)), tmp_path / "run").run()
    ((_, noise),) = came
    assert noise.written is not None
    assert noise.reward is not None
    assert noise.share is not None
    earned = noise.reward[noise.written].tolist()
    assert set(earned) == {0.25, 0.125}
    # Half of a group lies 1/16 above its mean, half below: less than the deviation that counts as full, 0.1.
    expected = [0.5 + 0.5 * (0.625 if own == 0.25 else -0.625) for own in earned]
    assert noise.share[noise.written][:, 0].tolist() == pytest.approx(expected)


def test_a_judge_takes_off_what_it_finds_unlikely(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    came, write, texts = steps_of(monkeypatch), rewards.roll_out, list[str]()

    def kept(*args: Any) -> list[Completion]:
        done = write(*args)
        texts.extend(own.text for own in done)
        return done

    monkeypatch.setattr(rewards, "roll_out", kept)
    some = ["reward=rules:equal", f"judge={start}", "judge_weight=0.5", "steps=1", "prompts=4", "batch=12"]
    Trainer(rewarding(start, tmp_path, *(f"stages.reward.{own}" for own in some)), tmp_path / "run").run()
    ((_, noise),) = came
    assert noise.written is not None
    assert noise.reward is not None
    judge, nats = colada.load(start), []
    assert judge.tokenizer is not None
    for text in texts:  # Each by itself.
        if judge.tokenizer.encode(text):
            score = measure(judge, [text], seed=[0])[0]
            nats.append(-score.log_likelihood / score.tokens)
        else:
            nats.append(math.log(judge.tokenizer.vocab_size))
    assert len(set(nats)) > 4
    earned = noise.reward[noise.written].tolist()
    assert sorted(earned) == pytest.approx(sorted(0.25 - 0.5 * own for own in nats), rel=1e-3)


def test_answers_may_be_encoded_again(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Latents as they were written are then nowhere in the loss."""
    some, step = ["latents=encoded", "steps=2"], Trainer._step
    made_so = rewarding(start, tmp_path, *(f"stages.reward.{own}" for own in some))
    Trainer(made_so, tmp_path / "whole").run()

    def without(self: Trainer, stage: Stage, number: int, rows: Batch, noise: Any) -> Any:
        return step(self, stage, number, rows, replace(noise, latents=noise.latents * torch.nan))

    monkeypatch.setattr(Trainer, "_step", without)
    Trainer(made_so, tmp_path / "without").run()
    assert_same_run(tmp_path / "without", tmp_path / "whole")
    with pytest.raises(ColadaError, match="not finite"):
        Trainer(
            rewarding(start, tmp_path, "stages.reward.steps=2", "run.max_skipped=0"), tmp_path / "none"
        ).run()


@pytest.mark.parametrize("kind", ["reward", "raft"])
def test_rewards_that_are_all_equal_teach_nothing(start: Path, tmp_path: Path, kind: str) -> None:
    flat = rewarding(start, tmp_path, f"stages.{kind}.reward=rules:equal", kind=kind)
    Trainer(flat, tmp_path / "run").run()
    before, after = colada.load(start), colada.load(tmp_path / "run" / "model")
    assert isinstance(before, ColaDLM)
    assert isinstance(after, ColaDLM)
    assert same(before.dit.state_dict(), after.dit.state_dict())


def test_how_answers_are_grouped_changes_nothing(start: Path, rewarded_run: Path, tmp_path: Path) -> None:
    Trainer(rewarding(start, tmp_path, "stages.reward.micro_batch=2"), tmp_path / "run").run()
    for record, again in zip(logged(rewarded_run), logged(tmp_path / "run"), strict=True):
        for key in {"loss", "push", "pull", "drift", "reward"} & record.keys():
            assert again[key] == pytest.approx(record[key], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (float("nan"), "is nan"),
        pytest.param(ValueError("no dictionary"), "failed: no dictionary", marks=pytest.mark.slow),
        pytest.param("good", "is 'good'", marks=pytest.mark.slow),
    ],
)
def test_a_reward_that_is_none_stops_the_run_saved(
    start: Path, tmp_path: Path, value: object, said: str
) -> None:
    changing = rewarding(start, tmp_path, "stages.reward.reward=rules:changing")
    rules.said.clear()
    Trainer(changing, tmp_path / "whole").run()

    class Then(At):
        def act(self) -> None:
            rules.said["value"] = value

    with pytest.raises(
        ColadaError, match=rf"reward step 5: the reward rules:changing of prompt '.*{said}.*; saved"
    ):
        Trainer(changing, tmp_path / "run", Then("reward", 3)).run()
    assert (tmp_path / "run" / "checkpoints" / "reward-00000004").is_dir()
    rules.said.clear()
    Trainer(changing, tmp_path / "run").run()
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_answers_come_with_the_latents_of_the_readable_loop() -> None:
    model = tiny_model()
    prompts = [[3, 4, 5, 6, 7], [9, 8]]
    settings: Any = {"steps": 3, "guidance": 1.0, "end_ids": ()}
    asked = [TextRequest(ids, 7, {**settings, "seed": n}) for n, ids in enumerate(prompts)]
    for number, (own, ids) in enumerate(zip(roll_out(model, asked), prompts, strict=True)):
        plain = reference(model, request(model, ids, 7, number, **settings))
        prefix = len(ids) // 4 * 4
        assert own.latents is not None
        torch.testing.assert_close(
            own.latents[prefix:], torch.cat([z for z, _ in plain]), rtol=1e-3, atol=1e-4
        )
        torch.testing.assert_close(own.latents[:prefix], model.encode(ids)[:prefix], rtol=1e-3, atol=1e-4)
        assert [*ids[prefix:], *own.ids][len(ids) - prefix :] == [t for _, ids_of in plain for t in ids_of][
            len(ids) - prefix :
        ]
        assert own.tokens == own.ids[:7]


def test_what_was_asked_is_taken_out_of_the_template(start: Path) -> None:
    model = colada.load(start)
    assert model.tokenizer is not None
    one = model.chat_prompt([{"role": "user", "content": "Who?"}])
    assert plain_prompt(model, model.tokenizer.encode(one)) == "Who?"
    two = model.chat_prompt([{"role": "system", "content": "x"}, {"role": "user", "content": "Who?"}])
    assert plain_prompt(model, model.tokenizer.encode(two)) == "Who?"
    model.chat_template = "{{ messages[0]['content'] }}"
    assert plain_prompt(model, model.tokenizer.encode(two)) == two
    model.chat_template = None
    assert plain_prompt(model, model.tokenizer.encode("Who?")) == "Who?"


def test_what_cannot_be_is_refused(start: Path, tmp_path: Path) -> None:
    with pytest.raises(ColadaError, match=r"reward.*task='wrods'.*did you mean 'words'"):
        rewarding(start, tmp_path, "stages.reward.reward=wrods")
    with pytest.raises(ColadaError, match="has no function 'lettres'"):
        rewarding(start, tmp_path, "stages.reward.reward=rules:lettres")
    with pytest.raises(ColadaError, match="sampler: steps=0"):
        rewarding(start, tmp_path, "stages.reward.sampler={steps: 0}")
    with pytest.raises(ColadaError, match="the task story_questions without questions"):
        rewarding(start, tmp_path, "stages.reward.reward=story_questions")
    with pytest.raises(ColadaError, match=r"questions='q.jsonl' with reward='rules:letters'"):
        rewarding(start, tmp_path, "stages.reward.questions=q.jsonl")
    with pytest.raises(ColadaError, match=r"credit='until_met' with a judge"):
        rewarding(start, tmp_path, "stages.reward.credit=until_met", f"stages.reward.judge={start}")
    for key in ("space=z0", "self_conditioning=0.5"):  # Their losses are without.
        with pytest.raises(ColadaError, match=rf"stages.reward.{key.partition('=')[0]}="):
            rewarding(start, tmp_path, f"stages.reward.{key}")


def test_questions_that_are_not_there_are_missed_before_anything_is_done(start: Path, tmp_path: Path) -> None:
    missing = tmp_path / "missing.jsonl"
    of_rewards = rewarding(
        *(start, tmp_path, f"stages.reward.questions={missing}", "stages.reward.reward=story_questions")
    )
    with pytest.raises(ColadaError, match=r"missing.jsonl: no such file"):
        preflight(of_rewards)
    with pytest.raises(ColadaError, match=r"no/judge"):
        preflight(rewarding(start, tmp_path, f"stages.reward.judge={tmp_path}/no/judge"))
    with pytest.raises(ColadaError, match=r"stages.reward.judge=bundled-few is distilled"):
        plan_run(rewarding(start, tmp_path, "stages.reward.judge=bundled-few"))
    source = f"{{path: {STORIES}, format: tasks, questions: {missing}}}"
    with pytest.raises(ColadaError, match=r"missing.jsonl: no such file.*data.sources.0.questions"):
        preflight(made(start, tmp_path, "reward", source))


def test_guided_answers_are_planned_as_two_rows(start: Path, tmp_path: Path) -> None:
    """With the pass that appends a block: of 2 steps 5 in place of 3, of which 2 see their block alone."""
    plans = [
        plan_run(rewarding(start, tmp_path, f"stages.reward.sampler={{steps: 2, guidance: {scale}}}"))
        for scale in (1.0, 3.0)
    ]
    model = colada.load(start)
    assert isinstance(model, ColaDLM)
    config, size, entries = model.dit.config, model.dit.config.block_size, position_entries(model.dit)
    layer, texts, updates = 4 * config.heads * config.head_dim, 2 * 3, 2
    alone = conditional = 0
    for block in range((64 - 8) // size, 64 // size):  # The last 8 tokens of a full row.
        alone += size * (2 * entries + config.num_layers * layer * size)
        conditional += size * (2 * entries + config.num_layers * layer * (block + 1) * size)
    for plan, flops in zip(plans, (3 * conditional, 3 * conditional + 2 * alone), strict=True):
        assert plan.phases[0].flops["answers"] == texts * flops / updates


def test_a_judge_is_planned(start: Path, tmp_path: Path) -> None:
    plain, of_text = (
        plan_run(rewarding(start, tmp_path, *more)).phases[0]
        for more in ([], [f"stages.reward.judge={start}"])
    )
    judge = colada.load(start)
    assert isinstance(judge, ColaDLM)
    assert "judge" not in plain.memory
    assert of_text.memory["judge"] == 4 * sum(
        p.numel() for network in judge.networks.values() for p in network.parameters()
    )
    assert judge.tokenizer is not None
    size = {"dim": 32, "num_layers": 1, "num_heads": 2, "ffn_dim": 32}
    decoder = Decoder(DecoderConfig(vocab_size=judge.tokenizer.vocab_size, objective="ar", **size))
    decoder.init_weights(torch.Generator().manual_seed(0))
    AutoregressiveLM(decoder, judge.tokenizer).save(tmp_path / "ar")
    phase = plan_run(rewarding(start, tmp_path, f"stages.reward.judge={tmp_path / 'ar'}")).phases[0]
    assert phase.memory["judge"] == 4 * sum(p.numel() for p in decoder.parameters())
    texts, tokens, updates = 2 * 3, 8, 2
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        decoder_loss(decoder, Batch(torch.zeros(texts, tokens, dtype=torch.int64)), MaskNoise())
    # Attention runs dense, where half of it is useful.
    assert phase.flops["judge"] * updates == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_each_rank_has_all_weights_that_write(start: Path, tmp_path: Path) -> None:
    alone, two = (plan_run(rewarding(start, tmp_path), ranks).phases[0].memory for ranks in (1, 2))
    assert "whole networks" not in alone
    assert two["whole networks"] == pytest.approx(alone["weights"] + alone["frozen networks"], rel=0.01)
