"""``vlv eval predict EXPERIMENT``, ``vlv eval judge RUN``, ``vlv eval score RUN``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from tqdm import tqdm

from vlv.cli import common

if TYPE_CHECKING:
    from vlv.evaluation.experiments.backends import Backends
    from vlv.evaluation.experiments.run import Report, Run
    from vlv.evaluation.experiments.samples import DataSet
    from vlv.jobs.tally import Tally

predict = typer.Typer(
    name="predict",
    help="First step: write the captions and draw the pictures of an experiment.",
    no_args_is_help=True,
)

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of the run.")]
NewRun = Annotated[Path, typer.Option("--run", help="Folder of the run; the same command goes on.")]
Sources = Annotated[
    list[str],
    typer.Option(
        "--from",
        metavar="NAME=KIND:VALUE",
        help="Captions: true, other, words, again, file:PATH, model:MODEL, endpoint:MODEL@URL; or z:MODEL. Repeat it.",
    ),
]
Split = Annotated[str, typer.Option(help="Of the toy world; not with --images.")]
Num = Annotated[int | None, typer.Option(min=1, help="Samples; 1000, or all of --images.")]
Images = Annotated[
    list[str] | None, typer.Option("--images", help="Files or folders instead of the toy world.")
]
References = Annotated[
    Path | None, typer.Option(help="Right captions of --images: COCO's .json, or .jsonl.")
]
KeyEnv = Annotated[
    str | None, typer.Option(help="Environment variable that holds the key of the endpoint.")
]
Concurrency = Annotated[int, typer.Option(min=1, help="Requests in flight at the same time.")]
PerMinute = Annotated[float | None, typer.Option(help="Most requests a minute.")]
Timeout = Annotated[float, typer.Option(help="Seconds until an answer must be complete.")]
Dtype = Annotated[
    str,
    typer.Option(
        help="Of the weights that draw: auto, float32, float16 or bfloat16; auto is bfloat16 on a GPU."
    ),
]
MaxRequests = Annotated[int | None, typer.Option(min=1, help="Requests that may be sent at most.")]


def data_set(
    split: str, seed: int, num: int | None, images: list[str] | None, references: Path | None
) -> DataSet:
    """The options of a command as a DataSet."""
    from vlv.errors import ConfigError
    from vlv.evaluation.experiments.samples import DataSet

    if images:
        texts = None if references is None else str(references)
        return DataSet(None, seed, num, tuple(images), texts)
    if references is not None:
        raise ConfigError("--references has no effect without --images; the toy world has its own")
    kind: Any = split
    return DataSet(kind, seed, num or 1000)


@contextmanager
def backends(
    device: str,
    batch_size: int,
    folder: Path,
    *,
    key_env: str | None = None,
    concurrency: int = 8,
    requests_per_minute: float | None = None,
    timeout: float = 120.0,
    max_requests: int | None = None,
) -> Iterator[Backends]:
    """Models and endpoints for one command."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from vlv.endpoint import Budget
    from vlv.evaluation.experiments.backends import Backends
    from vlv.models.placement import pick_device

    disable_progress_bar()
    found = Backends(
        torch.device(pick_device(device)),
        batch_size,
        endpoint={
            "key_env": key_env,
            "concurrency": concurrency,
            "requests_per_minute": requests_per_minute,
            "timeout": timeout,
        },
        budget=None if max_requests is None else Budget(requests=max_requests),
        store=folder / "answers",
    )
    try:
        yield found
    finally:
        found.close()


@contextmanager
def progress(what: str) -> Iterator[Report]:
    """A bar on stderr, and the first few failures by name."""
    shown = 0
    with tqdm(desc=what, unit=" rows", disable=not sys.stderr.isatty()) as bar:

        def report(rows: Any) -> None:
            nonlocal shown
            for row in rows:
                if row.get("error") is not None:
                    shown += 1
                    if shown <= 5:
                        with bar.external_write_mode(sys.stderr):
                            common.say(f"failed: {row.get('id', '')}: {row['error']}")
            bar.update(len(rows))

        try:
            yield report
        except KeyboardInterrupt:
            common.say("what is finished is kept; the same command goes on from there")
            raise
    if shown > 5:
        common.say(f"... and {shown - 5} more, each with its error in the table")


def close(tally: Tally, run: Run, step: str) -> int:
    """Say what was done and what comes next."""
    code = common.close(tally, run.folder)
    if tally.failed:
        common.say("the same command tries the failed ones again")
    common.say(f"next: vlv eval {step} {run.folder}")
    return code


@predict.command()
def reconstruction(
    run_folder: NewRun,
    sources: Sources,
    split: Split = "test",
    num: Num = None,
    images: Images = None,
    references: References = None,
    preset: Annotated[
        Literal["toy", "sd35-medium"], typer.Option(help="Painter, steps and guidances.")
    ] = "toy",
    painter: Annotated[
        str | None, typer.Option(help="model:MODEL or diffusers:NAME, instead of the preset's.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.")] = None,
    guidance: Annotated[
        list[float] | None, typer.Option(min=0, help="Repeat it for several scales.")
    ] = None,
    seed: common.Seed = 1,
    batch_size: common.BatchSize = 16,
    device: common.Device = "auto",
    dtype: Dtype = "auto",
    key_env: KeyEnv = None,
    concurrency: Concurrency = 8,
    requests_per_minute: PerMinute = None,
    timeout: Timeout = 120.0,
    max_requests: MaxRequests = None,
) -> int:
    """Experiments 1 and 2: draw pictures from captions and from caption embeddings (Tables 1, 4, 5)."""
    from vlv.evaluation.experiments import reconstruction as experiment
    from vlv.evaluation.experiments.painters import PRESETS
    from vlv.evaluation.experiments.run import Run

    taken = PRESETS[preset]
    settings = experiment.settings(
        sources,
        painter or taken.painter,
        steps or taken.steps,
        guidance or taken.guidances,
        common.dtype_name(common.placement(device, dtype)),
    )
    data = data_set(split, seed, num, images, references)
    run = Run.start(run_folder, experiment.NAME, data, settings)
    with (
        backends(
            device,
            batch_size,
            run.folder,
            key_env=key_env,
            concurrency=concurrency,
            requests_per_minute=requests_per_minute,
            timeout=timeout,
            max_requests=max_requests,
        ) as helpers,
        progress("predicting") as report,
    ):
        tally = experiment.predict(run, helpers, report)
    return close(tally, run, "judge")


def _captions_only(
    run_folder: Path,
    name: str,
    settings: dict[str, Any],
    data: DataSet,
    options: dict[str, Any],
) -> int:
    """The predict step of the experiments that need captions and no pictures."""
    from vlv.evaluation.experiments.reconstruction import predict_captions
    from vlv.evaluation.experiments.run import Run

    run = Run.start(run_folder, name, data, settings)
    with backends(folder=run.folder, **options) as helpers, progress("captioning") as report:
        tally = predict_captions(run, helpers, report)
    return close(tally, run, "judge")


@predict.command()
def arena(
    run_folder: NewRun,
    sources: Sources,
    split: Split = "test",
    num: Num = None,
    images: Images = None,
    references: References = None,
    seed: common.Seed = 1,
    batch_size: common.BatchSize = 16,
    device: common.Device = "auto",
    key_env: KeyEnv = None,
    concurrency: Concurrency = 8,
    requests_per_minute: PerMinute = None,
    timeout: Timeout = 120.0,
    max_requests: MaxRequests = None,
) -> int:
    """Experiment 3: captions that judges will rate (Table 2), or that are measured against reference captions."""
    from vlv.evaluation.experiments import arena as experiment

    options = {
        "device": device,
        "batch_size": batch_size,
        "key_env": key_env,
        "concurrency": concurrency,
        "requests_per_minute": requests_per_minute,
        "timeout": timeout,
        "max_requests": max_requests,
    }
    data = data_set(split, seed, num, images, references)
    return _captions_only(run_folder, experiment.NAME, experiment.settings(sources), data, options)


@predict.command()
def vqa(
    run_folder: NewRun,
    sources: Sources,
    split: Split = "test",
    num: Num = None,
    images: Images = None,
    questions: Annotated[
        Path | None, typer.Option(help="Official questions file of VQAv2 or OK-VQA, for --images.")
    ] = None,
    annotations: Annotated[
        Path | None, typer.Option(help="The official annotations that belong to it.")
    ] = None,
    seed: common.Seed = 1,
    batch_size: common.BatchSize = 16,
    device: common.Device = "auto",
    key_env: KeyEnv = None,
    concurrency: Concurrency = 8,
    requests_per_minute: PerMinute = None,
    timeout: Timeout = 120.0,
    max_requests: MaxRequests = None,
) -> int:
    """Experiment 4: captions from which questions will be answered (Table 3)."""
    from vlv.evaluation.experiments import vqa as experiment

    options = {
        "device": device,
        "batch_size": batch_size,
        "key_env": key_env,
        "concurrency": concurrency,
        "requests_per_minute": requests_per_minute,
        "timeout": timeout,
        "max_requests": max_requests,
    }
    files = [None if path is None else str(path) for path in (questions, annotations)]
    data = data_set(split, seed, num, images, None)
    return _captions_only(
        run_folder, experiment.NAME, experiment.settings(sources, *files), data, options
    )


@predict.command()
def mixes(
    run_folder: NewRun,
    model: common.Model = common.SHIPPED_MODEL,
    split: Split = "test",
    num: Num = None,
    images: Images = None,
    steps: common.Steps = 20,
    guidance: common.Guidance = 2.0,
    seed: common.Seed = 1,
    batch_size: common.BatchSize = 16,
    device: common.Device = "auto",
    dtype: Dtype = "auto",
) -> int:
    """Experiment 7: mixes of the embeddings of every sample and the next two (Figure 6)."""
    from vlv.evaluation.experiments import mixes as experiment
    from vlv.evaluation.experiments.run import Run

    data = data_set(split, seed, num, images, None)
    settings = experiment.settings(
        model, steps, guidance, common.dtype_name(common.placement(device, dtype))
    )
    run = Run.start(run_folder, experiment.NAME, data, settings)
    with backends(device, batch_size, run.folder) as helpers, progress("mixing") as report:
        tally = experiment.predict(run, helpers, report)
    return close(tally, run, "judge")


def judge(
    run_folder: RunFolder,
    judges: Annotated[
        list[str],
        typer.Option(
            "--judge", metavar="NAME=KIND:VALUE", help="Who judges; see docs/evaluation.md."
        ),
    ],
    resize: Annotated[
        Literal["pytorch-fid", "clean-fid"], typer.Option(help="For Inception.")
    ] = "pytorch-fid",
    pairs: Annotated[
        bool, typer.Option("--pairs", help="In an arena: choose between every two, in both orders.")
    ] = False,
    shots: Annotated[int, typer.Option(min=0, help="For questions: examples before each.")] = 0,
    batch_size: common.BatchSize = 64,
    device: common.Device = "auto",
    key_env: KeyEnv = None,
    concurrency: Concurrency = 8,
    requests_per_minute: PerMinute = None,
    timeout: Timeout = 120.0,
    max_requests: MaxRequests = None,
) -> int:
    """Second step: judge what was predicted; only what is missing or failed is judged."""
    from vlv.evaluation.experiments.judging import judge_run
    from vlv.evaluation.experiments.run import Run, add
    from vlv.jobs.tally import Tally

    run = Run.open(run_folder)
    total = Tally()
    with (
        backends(
            device,
            batch_size,
            run.folder,
            key_env=key_env,
            concurrency=concurrency,
            requests_per_minute=requests_per_minute,
            timeout=timeout,
            max_requests=max_requests,
        ) as helpers,
        progress("judging") as report,
    ):
        for text in judges:
            total = add(
                total,
                judge_run(run, text, helpers, report, resize=resize, pairs=pairs, shots=shots),
            )
    return close(total, run, "score")


def score(
    run_folder: RunFolder,
    baseline: Annotated[
        Path | None, typer.Option(help="Another run, or its scores.jsonl, for paired tests.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of intervals and tests.")] = 0,
) -> int:
    """Third step: figures with intervals into RUN/result.json, and against a baseline paired tests."""
    import json

    from vlv.evaluation.experiments.judging import score_experiment
    from vlv.evaluation.experiments.run import Run
    from vlv.evaluation.results import Results, format_results

    run = Run.open(run_folder)
    section = score_experiment(run, seed, baseline)
    typer.echo(format_results(Results({}, (section,))))
    content = json.loads((run.folder / "result.json").read_text("utf-8"))
    for key, found in content["comparisons"].items():
        if found["p"] is None:
            typer.echo(f"{key}: nothing to compare with the baseline")
            continue
        typer.echo(
            f"{key}: {found['difference']:+.4f} against the baseline "
            f"({found['low']:+.4f} to {found['high']:+.4f}), p = {found['p']:.3g}, n = {found['n']}"
        )
    for note in content["notes"]:
        common.say(f"note: {note}")
    common.say(f"written: {run.folder / 'result.json'}")
    return 0


def rate(
    run_folder: RunFolder,
    rater: Annotated[str, typer.Option(help="Your name in the results; it decides the order.")],
    pairs: Annotated[bool, typer.Option("--pairs", help="Choose between two captions.")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 0,
) -> int:
    """Judge the captions of an arena yourself, on a page on this machine; every vote is saved at once."""
    from vlv.errors import ConfigError
    from vlv.evaluation.experiments import arena as experiment
    from vlv.evaluation.experiments.rating import Ballot, RatingServer
    from vlv.evaluation.experiments.run import Run

    if not rater.replace("-", "").isalnum():
        raise ConfigError(f'"{rater}" is no name for a rater; use letters, digits and hyphens')
    run = Run.open(run_folder)
    run.check(experiment.NAME)
    mode: experiment.Mode = "pairs" if pairs else "rating"
    key = experiment.PAIR_KEY if pairs else experiment.RATING_KEY
    about = {"judge": "human", "mode": mode}
    with run.filling(f"judgements/{rater}", key, about) as table:
        server = RatingServer(Ballot(run, table, mode, rater), port)
        common.say(f"open {server.url} in your browser; Ctrl-C ends it, and every vote is kept")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            common.say(f"{len(table)} votes in {table.path}; next: vlv eval score {run.folder}")
        finally:
            server.server_close()
    return 0


Results = Annotated[
    list[Path], typer.Argument(help="Run folders, result files, or folders of result files.")
]


def report(
    runs: Results,
    output: Annotated[Path, typer.Option("--output", "-o", help="The page.")] = Path("report.html"),
) -> int:
    """One HTML page of several runs: claims, tables, plots, pictures, and the paper's figures beside them."""
    from vlv.evaluation.report.document import read_results
    from vlv.evaluation.report.page import make_page
    from vlv.storage import write_text

    results = read_results(runs)
    folders = {run.name: run for run in runs if (run / "run.json").is_file()}
    write_text(output, make_page(results, folders))
    common.say(f"written: {output}")
    return 0


def results(
    files: Results,
    output: Annotated[Path, typer.Option("--output", "-o", help="The document.")] = Path(
        "docs/results.md"
    ),
) -> int:
    """Write docs/results.md from result files: the claims, every figure, and the paper's."""
    from vlv.evaluation.report.document import make_document, read_results
    from vlv.storage import write_text

    folder = files[0].as_posix()
    write_text(output, make_document(read_results(files), folder))
    common.say(f"written: {output}")
    return 0
