"""Which judge and which score belong to a run: the one place that knows all experiments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vlv.errors import ConfigError
from vlv.evaluation.experiments import arena, boxes, measures, mixes, reconstruction, vqa
from vlv.evaluation.experiments.backends import Backends
from vlv.evaluation.experiments.instruments import Instrument, load_inspector, make_instrument
from vlv.evaluation.experiments.run import Report, Run
from vlv.evaluation.experiments.scoring import Scores, score_run
from vlv.evaluation.metrics.features import Resize
from vlv.evaluation.results import Section
from vlv.jobs.tally import Tally

TITLES = {module.NAME: module.TITLE for module in (reconstruction, arena, vqa, mixes)}


def judge_run(
    run: Run,
    text: str,
    backends: Backends,
    report: Report = lambda rows: None,
    *,
    resize: Resize = "pytorch-fid",
    pairs: bool = False,
    shots: int = 0,
) -> Tally:
    """Let one judge do what it has not done yet.

    Args:
        run: What it judges.
        text: ``NAME=KIND:VALUE``, or ``KIND:VALUE`` for a judge that is called by its kind.
        backends: Models and endpoints.
        report: Receives finished rows.
        resize: For Inception, in a run of reconstruction.
        pairs: In an arena, choose between two instead of rating.
        shots: For questions, examples before each.

    Raises:
        ConfigError: The judge is none of those that the experiment knows, or an option has no effect on it.
    """
    name, spec = split_name(text)
    kind, _, value = spec.partition(":")
    _refuse(run, arena.NAME, "pairs", pairs)
    _refuse(run, vqa.NAME, "shots", shots > 0)
    match run.experiment:
        case reconstruction.NAME:

            def instrument() -> Instrument:
                if kind == "boxes":
                    return boxes.BoxesLook(lambda: backends.client(value))
                return make_instrument(spec, backends.device, resize)

            return reconstruction.judge(run, name, instrument, backends.batch_size, report)
        case arena.NAME:
            if kind in measures.KINDS:
                return _measure(run, name, spec, backends, report, pairs)
            mode: arena.Mode = "pairs" if pairs else "rating"
            about = {"judge": spec}
            return arena.judge(
                run, name, lambda: _rater(kind, value, backends), about, mode, report
            )
        case vqa.NAME:
            load = _reader_of(kind, value, backends)
            about = {"reader": spec, "instruction": vqa.INSTRUCTION}
            return vqa.judge(run, name, load, about, shots, report)
        case mixes.NAME:
            if kind != "inspector" or not value:
                raise ConfigError(f'"{spec}" judges no mixes; write inspector:FOLDER')
            folder, device = Path(value), backends.device
            return mixes.judge(
                run, name, lambda: load_inspector(folder, device), backends.batch_size, report
            )
    raise ConfigError(
        f"{run.folder} is a run of {run.experiment}, which this version does not know"
    )


def _refuse(run: Run, experiment: str, option: str, given: bool) -> None:
    if given and run.experiment != experiment:
        raise ConfigError(f"{option} has no effect on a run of {run.experiment}; leave it out")


def _measure(
    run: Run, name: str, spec: str, backends: Backends, report: Report, pairs: bool
) -> Tally:
    """One of the judges of an arena that measure instead of rating."""
    if pairs:
        raise ConfigError(f"pairs has no effect on the judge {spec}, which measures; leave it out")
    load = measures.loader(spec, backends.device)
    about = measures.about(spec, run.data.samples())
    return arena.measure(run, name, load, about, backends.batch_size, report)


def _rater(kind: str, value: str, backends: Backends) -> arena.Judge:
    if kind == "exact" and not value:
        return arena.ExactJudge()
    if kind == "endpoint":
        return arena.EndpointJudge(backends.client(value))
    raise ConfigError(
        f'"{kind}" is no judge of captions; write exact or claims for the toy world, references, clip:MODEL, or '
        "endpoint:MODEL@URL; people rate with vlv eval rate"
    )


def _reader_of(kind: str, value: str, backends: Backends) -> Any:
    """What makes a reader; wrong ones are refused at once, models are loaded when they are needed."""
    if kind == "parser" and not value:
        return vqa.ToyReader
    if kind == "endpoint":
        return lambda: vqa.EndpointReader(backends.client(value))
    if kind == "llm" and value:
        device: torch.device = backends.device
        return lambda: vqa.LocalReader(value, device, backends.batch_size)
    raise ConfigError(
        f'"{kind}" is no reader; write parser for the toy world, llm:MODEL, or endpoint:MODEL@URL'
    )


def split_name(text: str) -> tuple[str, str]:
    """Name and specification of a judge.

    >>> split_name("fid=inception:weights.pth"), split_name("pixels")
    (('fid', 'inception:weights.pth'), ('pixels', 'pixels'))
    """
    name, equals, spec = text.partition("=")
    if not equals or ":" in name:  # an equals sign further on belongs to an address
        name, spec = text.partition(":")[0], text
    if not name.replace("-", "").isalnum():
        raise ConfigError(f'"{name}" is no name for a judge; use letters, digits and hyphens')
    return name, spec


def score_experiment(run: Run, seed: int, baseline: Path | None = None) -> Section:
    """The figures of a run, written into its folder.

    Raises:
        ConfigError: The experiment is unknown.
        DataError: Nothing was judged, or the baseline does not fit.
    """
    scores: Scores
    match run.experiment:
        case reconstruction.NAME:
            scores = reconstruction.score(run, seed)
        case arena.NAME:
            scores = arena.score(run, seed)
        case vqa.NAME:
            scores = vqa.score(run)
        case mixes.NAME:
            scores = mixes.score(run)
        case _:
            raise ConfigError(
                f"{run.folder} is a run of {run.experiment}, which this version does not know"
            )
    return score_run(run, scores, TITLES[run.experiment], seed, baseline)
