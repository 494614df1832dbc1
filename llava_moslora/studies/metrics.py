"""Checks that a study's runs will have its metrics: before any of them starts, and again when the first has ended.

The metrics of evaluations and steps follow from a run's flags. For adapter metrics, with a slash in their name, the
names are known, but not which of them an arm has. Machine-dependent metrics are known only from a log.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from llava_moslora.data.split import set_names
from llava_moslora.errors import Refusal, did_you_mean
from llava_moslora.runs.log import METRICS_FILE, read_rows
from llava_moslora.studies.runs import Run, Settings
from llava_moslora.studies.study_file import Measure, Study
from llava_moslora.training.evaluation_flags import metric_names

EVERY_STEP = ("loss", "grad_norm", "learning_rate", "epoch", "samples_per_second", "tokens_per_second")
OF_A_GPU = ("mfu", "peak_memory_gib")
OF_ADALORA = ("cross_entropy", "orthogonality")
# Of training.callbacks.adapter_stats, with which llm, vision or head is meant; more where the method is stock PEFT's
OF_ADAPTERS = tuple(
    name.format(part)
    for part in ("llm", "vision", "head")
    for name in ("mixer/{}/largest", "mixer/{}/smallest", "mixer/{}/rank", "delta/{}", "delta_largest/{}")
)
OPEN_ENDED = ("weight/", "gradient/")  # of a part and a kind of tensor, which are the method's
NOT_MEASURED = ("step",)  # in every row, but a count


def check_metrics(study: Study, run: Run, settings: Settings) -> None:
    """
    Args:
        settings: the run's, as its flags give them.

    Raises:
        Refusal: C-STUDY, the run will not log a metric of the study, with those that it will, and the closest name.
    """
    _, data, adapter, training = settings
    evaluates = str(training["eval_strategy"]) != "no" or training["eval_on_start"]
    evaluated = [f"eval_{name}" for name in metric_names(set_names(data))] + ["eval_runtime"]
    known = [*EVERY_STEP, *(OF_ADALORA if adapter.method == "adalora" else ()), *(evaluated if evaluates else ())]
    for number, measure in enumerate(study.measures):
        metric = measure.metric
        if not metric or metric in (*known, *OF_A_GPU, *OF_ADAPTERS) or metric.startswith(OPEN_ENDED):
            continue
        if "/" in metric:
            known = list(OF_ADAPTERS)
        fix = did_you_mean(metric, known)
        if not evaluates and (metric in evaluated or metric.startswith("eval")):
            fix = "evaluate it: flags: {validation_split: 0.01, eval_strategy: epoch}"
        raise Refusal(
            "C-STUDY", f"{run.arm}: its runs will not log this metric", file=study.file,
            key=f"measures[{number}].metric", found=metric, expected=" | ".join(known),
            fix=fix or f"a name of {METRICS_FILE}",
        )  # fmt: skip


def check_logged(study: Study, runs: Iterable[Run]) -> None:
    """
    Raises:
        Refusal: C-STUDY, runs have ended, and none of them has logged a metric of the study; with what the first has.
            Adapter metrics may exist for some arms only, as LoRA has no mixer, and are not checked.
    """
    done = [run for run in runs if run.done]
    logged = [{name for row in read_rows(run.output / METRICS_FILE) for name in row} for run in done]
    for number, measure in enumerate(study.measures):
        if not measure.metric or "/" in measure.metric or not done or any(measure.metric in names for names in logged):
            continue
        has = sorted(logged[0] - set(NOT_MEASURED), key=lambda name: ("/" in name, name))
        raise Refusal(
            "C-STUDY", f"{done[0].name} has ended without this metric", file=study.file,
            key=f"measures[{number}].metric", found=measure.metric, expected=f"one that it has: {', '.join(has)}",
            fix=did_you_mean(measure.metric, has) or "one that it has; finished runs are kept",
        )  # fmt: skip


def check_value(study: Study, number: int, values: Sequence[str]) -> None:
    """
    Args:
        number: of a measure that a script makes. values: that the script will give.

    Raises:
        Refusal: C-STUDY, the script will not give the measure's value.
    """
    measure: Measure = study.measures[number]
    if measure.value not in values:
        raise Refusal(
            "C-STUDY", f"{measure.script} will not give this value", file=study.file, key=f"measures[{number}].value",
            found=measure.value, expected=" | ".join(values), fix=did_you_mean(measure.value, values) or None,
        )  # fmt: skip
