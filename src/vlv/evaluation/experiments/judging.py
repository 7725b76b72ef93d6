"""Which judge and which score belong to a run: the one place that knows all experiments."""

from __future__ import annotations

from pathlib import Path

from vlv.errors import ConfigError
from vlv.evaluation.experiments import reconstruction
from vlv.evaluation.experiments.backends import Backends
from vlv.evaluation.experiments.instruments import make_instrument
from vlv.evaluation.experiments.run import Report, Run
from vlv.evaluation.experiments.scoring import score_run
from vlv.evaluation.metrics.features import Resize
from vlv.evaluation.results import Section
from vlv.jobs.tally import Tally


def judge_run(
    run: Run,
    text: str,
    backends: Backends,
    report: Report = lambda rows: None,
    *,
    resize: Resize = "pytorch-fid",
) -> Tally:
    """Let one judge do what it has not done yet.

    Args:
        run: What it judges.
        text: ``NAME=KIND:VALUE``, or ``KIND:VALUE`` for a judge that is called by its kind.
        backends: Models and endpoints.
        report: Receives finished rows.
        resize: For Inception.

    Raises:
        ConfigError: The judge is none of those that the experiment knows.
    """
    name, spec = split_name(text)
    if run.experiment == reconstruction.NAME:
        return reconstruction.judge(
            run,
            name,
            lambda: make_instrument(spec, backends.device, resize),
            backends.batch_size,
            report,
        )
    raise ConfigError(
        f"{run.folder} is a run of {run.experiment}, which this version does not know"
    )


def split_name(text: str) -> tuple[str, str]:
    """Name and specification of a judge.

    >>> split_name("fid=inception:weights.pth"), split_name("pixels")
    (('fid', 'inception:weights.pth'), ('pixels', 'pixels'))
    """
    name, equals, spec = text.partition("=")
    if not equals:
        return text.partition(":")[0], text
    if not name.replace("-", "").isalnum():
        raise ConfigError(f'"{name}" is no name for a judge; use letters, digits and hyphens')
    return name, spec


def score_experiment(run: Run, seed: int, baseline: Path | None = None) -> Section:
    """The figures of a run, written into its folder."""
    if run.experiment == reconstruction.NAME:
        return score_run(run, reconstruction.score(run, seed), reconstruction.TITLE, seed, baseline)
    raise ConfigError(
        f"{run.folder} is a run of {run.experiment}, which this version does not know"
    )
