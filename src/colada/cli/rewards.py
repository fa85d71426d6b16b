"""``colada eval reward`` and ``colada pairs``: how well chat models do what rules ask, and better by them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from colada.checks import MOST_TOKENS, require_count
from colada.cli.evaluate import (
    BatchOption,
    PageOption,
    QuietOption,
    StepsOption,
    check_counts,
    existing_paths,
)
from colada.cli.measure import ResultOption, write_result
from colada.cli.options import (
    DeviceOption,
    DtypeOption,
    ModelOption,
    RevisionOption,
    check_model_options,
    load_model,
    number_option,
)
from colada.errors import ColadaError
from colada.generate.settings import check_settings

TasksOption = Annotated[
    str | None, typer.Option(metavar="NAME,...", help="Which tasks. Default: all that need no questions.")
]
QuestionsOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Questions on stories, for the task story_questions.")
]


def reward(
    stories: Annotated[
        Path,
        typer.Argument(help="Texts that samples of tasks are cut from, as in training: a file or folder."),
    ],
    model: ModelOption = None,
    revision: RevisionOption = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="WHERE", help="Another model: who wins, and how far the flow has gone from its."
        ),
    ] = None,
    judge: Annotated[
        str | None, typer.Option(metavar="WHERE", help="A model that says how likely the answers are.")
    ] = None,
    tasks: TasksOption = None,
    questions: QuestionsOption = None,
    prompts: Annotated[int, typer.Option(help="Of each task, as far as there are any.")] = 300,
    seeds: Annotated[int, typer.Option(help="Answers to each prompt.")] = 3,
    samples: Annotated[
        int, typer.Option(help="Answers to each of 20 prompts, for the best of K and for variety; 1: none.")
    ] = 16,
    new_tokens: Annotated[int, typer.Option(help="Of an answer at most.")] = 40,
    batch: BatchOption = 64,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = None,
    out: ResultOption = None,
    html: PageOption = None,
    quiet: QuietOption = False,
) -> None:
    """Ask a chat model what rules can check, on prompts kept from training: rewards, wins, drift, variety."""
    from rich.console import Console

    from colada.data.instructions import check_tasks, default_tasks
    from colada.report.style import require_matplotlib
    from colada.train.display import Display

    names = tuple(name.strip() for name in tasks.split(",")) if tasks else default_tasks(questions)
    check_tasks(names, questions)
    check_counts(prompts=prompts, seeds=seeds, samples=samples, batch=batch)
    require_count("new_tokens", new_tokens, MOST_TOKENS)
    existing_paths([str(stories)])
    for where in (model, against, judge):
        check_model_options(where, revision if where is model else None, dtype, device)
    if html is not None:
        require_matplotlib("a page")

    from colada.data.sources import stories as read
    from colada.evaluate.generative import ModelJudge
    from colada.evaluate.rewards import (
        answered_samples,
        drift,
        encoded_again,
        evaluate_rewards,
        held_out_prompts,
        plain_samples,
    )
    from colada.evaluate.texts import require_tokenizer
    from colada.models.cola import ColaDLM
    from colada.models.likelihood import bound_settings
    from colada.report.rewards import flow_table, rewards_table, write_rewards_page

    display = Display(Console(stderr=True, quiet=quiet))
    texts = read(stories)
    network = load_model(model, revision, dtype, device)
    other = None if against is None else load_model(against, None, dtype, device)
    for own in (network, other):
        if own is not None and own.chat_template is None:
            raise ColadaError(f"{own.origin} has no chat template, expected a model of conversations")
    tokenizer = require_tokenizer(network, "a chat is text")
    asked = held_out_prompts(texts, names, prompts, questions)
    flows: dict[str, Any] = {}
    if isinstance(network, ColaDLM) and isinstance(other, ColaDLM):
        some = answered_samples(network, texts, names, max(1, 200 // len(names)), questions)
        flows["answers"] = drift(network, other, some)
        flows["plain stories"] = drift(network, other, plain_samples(network, texts, 100))
    reader = None
    if judge is not None:
        judging = load_model(judge, None, dtype, device)
        reader = ModelJudge(judging, tokenizer, **bound_settings(judging), batch=batch)
    settings: dict[str, Any] = {
        "prompts": prompts,
        "seeds": seeds,
        "samples": samples,
        "new_tokens": new_tokens,
    }
    with display.task("answers", total=len(asked), unit="texts"):
        result = evaluate_rewards(
            network,
            asked,
            against=other,
            judge=reader,
            seeds=seeds,
            samples=samples,
            new_tokens=new_tokens,
            batch=batch,
            questions=questions,
            progress=display.advance,
        )
    again = None
    if isinstance(network, ColaDLM):
        again = encoded_again(network, [own.prompts[0] for own in asked], new_tokens, batch)
    console = Console(highlight=False)
    rewards_table(result).print(console)
    if flows:
        flow_table(flows).print(console)
    facts = {
        "model": network.origin,
        "against": None if other is None else other.origin,
        "judge": judge,
        "stories": str(stories),
        "generation": network.chosen({}),
        "latents_encoded_again": again,
        **settings,
    }
    write_result(out, network, {**facts, **result, "flows": flows})
    if html is not None:
        write_rewards_page(html, network.origin, result, flows, facts)
        print(f"wrote {html}")


def pairs(
    stories: Annotated[
        Path,
        typer.Argument(help="Texts that samples of tasks are cut from, as in training: a file or folder."),
    ],
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="The .jsonl of pairs; gone on with if it is there.")
    ],
    model: ModelOption = None,
    revision: RevisionOption = None,
    tasks: TasksOption = None,
    questions: QuestionsOption = None,
    reward: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION", help="A rule in place of the tasks' own, of prompt and answer."
        ),
    ] = None,
    prompts: Annotated[int, typer.Option(help="Of each task, as far as there are any.")] = 500,
    samples: Annotated[int, typer.Option(min=2, help="Answers to each prompt.")] = 8,
    new_tokens: Annotated[int, typer.Option(help="Of an answer at most.")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Of prompts and answers.")] = 0,
    steps: StepsOption = None,
    guidance: Annotated[
        float | None, number_option("--guidance", "-g", help="Guidance scale. Default: the model's own.")
    ] = None,
    batch: BatchOption = 64,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = None,
    quiet: QuietOption = False,
) -> None:
    """Make preferences of a chat model's own answers: to each prompt the best one and the worst, by a rule.

    Stopped at any moment, the same command goes on where it was.
    """
    from rich.console import Console

    from colada.data.instructions import check_tasks, default_tasks
    from colada.data.rules import imported
    from colada.train.display import Display

    names = tuple(name.strip() for name in tasks.split(",")) if tasks else default_tasks(questions)
    check_tasks(names, questions)
    check_counts(prompts=prompts, samples=samples, batch=batch)
    require_count("new_tokens", new_tokens, MOST_TOKENS)
    check_settings({"steps": steps, "guidance": guidance, "seed": seed})
    existing_paths([str(stories)])
    check_model_options(model, revision, dtype, device)
    if reward is not None:
        imported(reward)

    from colada.data.sources import stories as read
    from colada.evaluate.preferences import taught_prompts, write_pairs

    display = Display(Console(stderr=True, quiet=quiet))
    asked = taught_prompts(read(stories), names, prompts, seed, questions)
    settings = {
        name: value for name, value in (("steps", steps), ("guidance", guidance)) if value is not None
    }
    network = load_model(model, revision, dtype, device)
    with display.task("pairs", total=len(asked), unit="prompts"):
        count = write_pairs(
            *(out, network, asked),
            questions=questions,
            reward=reward,
            progress=display.advance,
            samples=samples,
            new_tokens=new_tokens,
            seed=seed,
            settings=settings,
            batch=batch,
        )
    print(f"wrote {out}: {count:,} pairs of {len(asked):,} prompts; answers to the others are all as good")
