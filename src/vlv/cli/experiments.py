"""``vlv eval predict EXPERIMENT``, ``vlv eval judge RUN``, ``vlv eval score RUN``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from vlv.cli import common
from vlv.cli.engine import EngineOptions
from vlv.cli.options import option_group, options, takes_options
from vlv.cli.toyworld import SplitName
from vlv.storage import Json

if TYPE_CHECKING:
    from vlv.evaluation.experiments.backends import Backends
    from vlv.evaluation.experiments.run import Experiment, Report, Run
    from vlv.evaluation.experiments.samples import DataSet
    from vlv.jobs.table import Row
    from vlv.jobs.tally import Tally

predict = typer.Typer(
    name="predict",
    help="First step: write the captions and generate the images of an experiment.",
    no_args_is_help=True,
)

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of the run.")]


@option_group("Samples")
class SampleOptions:
    """What an experiment looks at."""

    split: Annotated[SplitName, typer.Option(help="Of the toy world; not with --images.")] = "test"
    num: Annotated[int | None, typer.Option(min=1, help="Samples; 1000, or all of --images.")] = (
        None
    )
    images: Annotated[
        list[str], typer.Option(help="Files or folders instead of the toy world.")
    ] = field(default_factory=list)
    image_root: common.ImageRoot = None
    seed: common.Seed = 1

    def data(self, references: Path | None = None) -> DataSet:
        """The samples."""
        from vlv.errors import ConfigError
        from vlv.evaluation.experiments.samples import DataSet

        if self.images:
            texts = None if references is None else str(references)
            return DataSet(
                None, self.seed, self.num, tuple(self.images), texts, image_root=self.image_root
            )
        if references is not None:
            raise ConfigError(
                "--references has no effect without --images; the toy world has its own"
            )
        if self.image_root is not None:
            raise ConfigError("--image-root has no effect without --images; leave it out")
        return DataSet(self.split, self.seed, self.num or 1000)


@option_group("Work")
class WorkOptions:
    """Where and how models work."""

    batch_size: common.BatchSize = 16
    device: common.Device = "auto"

    @contextmanager
    def backends(
        self, folder: Path, asking: common.EndpointOptions | None = None
    ) -> Iterator[Backends]:
        """Models and endpoints for one command."""
        from vlv.evaluation.experiments.backends import Backends

        device = common.quiet_device(self.device)
        found = Backends(device, self.batch_size, store=folder / "answers")
        if asking is not None:
            found.endpoint, found.budget, found.prices = (
                asking.endpoint,
                asking.budget(),
                asking.prices(),
            )
        try:
            yield found
        finally:
            found.close()


@contextmanager
def progress(what: str, *, resumable: bool = True) -> Iterator[Report]:
    """Progress over the rows of an experiment, which an interruption keeps or loses."""
    with common.Progress(what=what, unit="row", resumable=resumable) as shown:
        yield lambda rows: shown.report([_failure(row) for row in rows])


def _failure(row: Row) -> str | None:
    return None if row.get("error") is None else f"{row.get('id', '')}: {row['error']}"


def close(tally: Tally, run: Run, step: str) -> int:
    """Say what was done and what comes next."""
    code = common.close(tally, run.folder)
    if tally.failed:
        common.say("the same command tries the failed ones again")
    common.say(f"next: vlv eval {step} {run.folder}")
    return code


@options
class PredictOptions:
    """What the first step of every experiment takes."""

    run_dir: common.RunDir
    samples: SampleOptions
    work: WorkOptions
    engine: EngineOptions

    def predict(
        self,
        experiment: Experiment,
        settings: Json,
        asking: common.EndpointOptions | None = None,
        references: Path | None = None,
    ) -> int:
        """Begin the run, or go on with it."""
        from vlv.evaluation.experiments.run import Run

        engine = self.engine.settings()
        run = Run.start(self.run_dir, experiment.NAME, self.samples.data(references), settings)
        with self.work.backends(run.folder, asking) as backends, progress("predicting") as report:
            backends.engine = engine
            tally = experiment.predict(run, backends, report)
        return close(tally, run, "judge")


@options
class CaptionOptions(PredictOptions):
    """What experiments take that begin with captions."""

    sources: Annotated[
        list[str],
        typer.Option(
            "--from",
            metavar="NAME=KIND:VALUE",
            help="Captions: true, other, words, again, file:PATH, model:MODEL, endpoint:MODEL@URL; or z:MODEL; an adapter as MODEL+ADAPTER. Repeat it.",
        ),
    ]
    endpoint: common.EndpointOptions


@options
class ArenaOptions(CaptionOptions):
    """``vlv eval predict arena``."""

    references: Annotated[
        Path | None,
        typer.Option(
            help="Right captions of --images: COCO's .json, or .jsonl.", rich_help_panel="Samples"
        ),
    ] = None


@options
class ReconstructionOptions(ArenaOptions):
    """``vlv eval predict reconstruction``."""

    preset: Annotated[
        Literal["toy", "sd35-medium"], typer.Option(help="Generator, steps and guidances.")
    ] = "toy"
    generator: Annotated[
        str | None, typer.Option(help="model:MODEL or diffusers:NAME, instead of the preset's.")
    ] = None
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.")] = None
    guidance: Annotated[list[float], typer.Option(min=0, help="Repeat it for several scales.")] = (
        field(default_factory=list)
    )
    dtype: common.DType = "auto"


@predict.command()
@takes_options
def reconstruction(given: ReconstructionOptions) -> int:
    """Experiments 1 and 2: generate images from captions and from caption embeddings (Tables 1, 4, 5)."""
    from vlv.evaluation.experiments import reconstruction as experiment
    from vlv.evaluation.experiments.generators import PRESETS

    preset = PRESETS[given.preset]
    settings = experiment.settings(
        given.sources,
        given.generator or preset.generator,
        given.steps or preset.steps,
        given.guidance or preset.guidances,
        common.dtype_name(common.placement(given.work.device, given.dtype)),
    )
    return given.predict(experiment, settings, given.endpoint, given.references)


@predict.command()
@takes_options
def arena(given: ArenaOptions) -> int:
    """Experiment 3: captions that judges will rate (Table 2), or that are measured against reference captions."""
    from vlv.evaluation.experiments import arena as experiment

    settings = experiment.settings(given.sources)
    return given.predict(experiment, settings, given.endpoint, given.references)


@options
class VQAOptions(CaptionOptions):
    """``vlv eval predict vqa``."""

    questions: Annotated[
        Path | None, typer.Option(help="Official questions file of VQAv2 or OK-VQA, for --images.")
    ] = None
    annotations: Annotated[
        Path | None, typer.Option(help="The official annotations that belong to it.")
    ] = None


@predict.command()
@takes_options
def vqa(given: VQAOptions) -> int:
    """Experiment 4: captions from which questions will be answered (Table 3)."""
    from vlv.evaluation.experiments import vqa as experiment

    files = [None if path is None else str(path) for path in (given.questions, given.annotations)]
    return given.predict(experiment, experiment.settings(given.sources, *files), given.endpoint)


@options
class MixesOptions(PredictOptions):
    """``vlv eval predict mixes``."""

    model: common.Model = common.SHIPPED_MODEL
    steps: common.Steps = 20
    guidance: common.Guidance = 2.0
    dtype: common.DType = "auto"


@predict.command()
@takes_options
def mixes(given: MixesOptions) -> int:
    """Experiment 7: mixes of the embeddings of every sample and the next two (Figure 6)."""
    from vlv.evaluation.experiments import mixes as experiment

    dtype = common.dtype_name(common.placement(given.work.device, given.dtype))
    return given.predict(
        experiment, experiment.settings(given.model, given.steps, given.guidance, dtype)
    )


@options
class JudgeOptions:
    """``vlv eval judge``."""

    run_folder: RunFolder
    judges: Annotated[
        list[str],
        typer.Option(
            "--judge", metavar="NAME=KIND:VALUE", help="Who judges; see docs/evaluation.md."
        ),
    ]
    resize: Annotated[Literal["pytorch-fid", "clean-fid"], typer.Option(help="For Inception.")] = (
        "pytorch-fid"
    )
    pairs: Annotated[
        bool, typer.Option("--pairs", help="In an arena: choose between every two, in both orders.")
    ] = False
    shots: Annotated[int, typer.Option(min=0, help="For questions: examples before each.")] = 0
    work: WorkOptions
    endpoint: common.EndpointOptions


@takes_options
def judge(given: JudgeOptions) -> int:
    """Second step: judge what was predicted; only what is missing or failed is judged."""
    from vlv.evaluation.experiments.judging import judge_run
    from vlv.evaluation.experiments.run import Judge, Run
    from vlv.jobs.tally import Tally

    run, total = Run.open(given.run_folder), Tally()
    with (
        given.work.backends(run.folder, given.endpoint) as backends,
        progress("judging") as report,
    ):
        for text in given.judges:
            one = Judge.parse(text, given.resize, given.pairs, given.shots)
            total += judge_run(run, one, backends, report)
    return close(total, run, "score")


@options
class ScoreOptions:
    """``vlv eval score``."""

    run_folder: RunFolder
    baseline: Annotated[
        Path | None, typer.Option(help="Another run, or its scores.jsonl, for paired tests.")
    ] = None
    against: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="A source of this run, or a guidance such as ours.g2: all others are tested against it.",
        ),
    ] = None
    seed: Annotated[int, typer.Option(min=0, help="Of intervals and tests.")] = 0


@takes_options
def score(given: ScoreOptions) -> int:
    """Third step: figures with intervals into RUN/result.json, and against a baseline paired tests."""
    import json

    from vlv.evaluation.experiments.judging import score_experiment
    from vlv.evaluation.experiments.run import Run
    from vlv.evaluation.results import Results, format_results

    run = Run.open(given.run_folder)
    section = score_experiment(run, given.seed, given.baseline, given.against)
    typer.echo(format_results(Results({}, (section,))))
    content = json.loads((run.folder / "result.json").read_text("utf-8"))
    for key, found in content["comparisons"].items():
        if found["p"] is None:
            typer.echo(f"{key}: nothing to compare")
            continue
        typer.echo(
            f"{key}: {found['difference']:+.4f}{'' if ' over ' in key else ' against the baseline'} "
            f"({found['low']:+.4f} to {found['high']:+.4f}), p = {found['p']:.3g}, n = {found['n']}"
        )
    for note in content["notes"]:
        common.say(f"note: {note}")
    common.say(f"written: {run.folder / 'result.json'}")
    return 0


@options
class RateOptions:
    """``vlv eval rate``."""

    run_folder: RunFolder
    rater: Annotated[str, typer.Option(help="Your name in the results; it decides the order.")]
    pairs: Annotated[bool, typer.Option("--pairs", help="Choose between two captions.")] = False
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 0


@takes_options
def rate(given: RateOptions) -> int:
    """Judge the captions of an arena yourself, on a page on this machine; every vote is saved at once."""
    from vlv.evaluation.experiments.rating import RatingServer, open_ballot
    from vlv.evaluation.experiments.run import Run

    run = Run.open(given.run_folder)
    with open_ballot(run, given.rater, "pairs" if given.pairs else "rating") as (ballot, table):
        server = RatingServer(ballot, given.port)
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
    """One HTML page of several runs: claims, tables, plots, images, and the paper's figures beside them."""
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
    """Write docs/results.md from result files: the claims, every figure, and the paper's.

    The text of a notes.md in a folder of results stands above them.
    """
    from vlv.evaluation.report.document import make_document, read_notes, read_results
    from vlv.storage import write_text

    folder = files[0].as_posix()
    write_text(output, make_document(read_results(files), folder, read_notes(files)))
    common.say(f"written: {output}")
    return 0
