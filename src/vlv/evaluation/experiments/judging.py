"""The experiments by name, and the steps that are the same for all."""

from __future__ import annotations

from pathlib import Path

from vlv.errors import ConfigError
from vlv.evaluation.experiments import arena, mixes, reconstruction, toyworld, vqa
from vlv.evaluation.experiments.backends import Backends
from vlv.evaluation.experiments.run import Experiment, Judge, Report, Run, silent
from vlv.evaluation.experiments.scoring import score_run
from vlv.evaluation.results import Section
from vlv.jobs.tally import Tally

_ALL: tuple[Experiment, ...] = (reconstruction, arena, vqa, mixes, toyworld)
EXPERIMENTS = {experiment.NAME: experiment for experiment in _ALL}


def experiment_of(run: Run) -> Experiment:
    """The experiment of a run.

    Raises:
        ConfigError: It is unknown.
    """
    if run.experiment not in EXPERIMENTS:
        raise ConfigError(
            f"{run.folder} is a run of {run.experiment}, which this version does not know"
        )
    return EXPERIMENTS[run.experiment]


def judge_run(run: Run, judge: Judge, backends: Backends, report: Report = silent) -> Tally:
    """Let one judge do what it has not done yet.

    Raises:
        ConfigError: The judge is none of those that the experiment knows, or an option has no effect on it.
    """
    options = {"pairs": (arena.NAME, judge.pairs), "shots": (vqa.NAME, judge.shots > 0)}
    for option, (experiment, given) in options.items():
        if given and run.experiment != experiment:
            raise ConfigError(f"{option} has no effect on a run of {run.experiment}; leave it out")
    return experiment_of(run).judge(run, judge, backends, report)


def score_experiment(
    run: Run, seed: int, baseline: Path | None = None, against: str | None = None
) -> Section:
    """The figures of a run, written into its folder.

    Raises:
        ConfigError: The experiment is unknown.
        DataError: Nothing was judged, or the baseline does not fit.
    """
    experiment = experiment_of(run)
    return score_run(run, experiment.score(run, seed), experiment.TITLE, seed, baseline, against)
