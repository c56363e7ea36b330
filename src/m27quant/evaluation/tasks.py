"""Standard tasks (gsm8k, mmlu_generative, ...) by EleutherAI's lm-eval over HTTP: the builtin server, or any other.

lm-eval is the extra `eval`; it asks a server in OpenAI's form and does all the rest: prompts, answers, scores.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from m27quant.checkpoint.sidecars import END_OF_TURN
from m27quant.errors import EnvironmentFault, UsageError, escape
from m27quant.evaluation.health import Z, wilson
from m27quant.evaluation.result import Estimate

NEEDED = ("lm_eval", "aiohttp", "tenacity")
SCORED = ("loglikelihood", "loglikelihood_rolling", "multiple_choice")
"""Kinds of tasks that want log probabilities of given text, which few servers have (`echo` with `logprobs`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskOptions:
    """What is asked; names are lm-eval's."""

    tasks: tuple[str, ...]
    num_fewshot: int | None = None
    """Examples before each question; None: as the task says."""
    limit: int | None = None
    """Questions of each task; None: all."""
    apply_chat_template: bool = False
    """Ask by /chat/completions, so that the server's template is applied; else by /completions."""
    include_path: Path | None = None
    """A folder with tasks of one's own."""
    num_concurrent: int = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """A server in OpenAI's form."""

    api: str
    """Its address, up to /v1."""
    model: str
    tokenizer: Path
    """The folder of the model's tokenizer, for tasks that score given answers."""


def require_lm_eval() -> None:
    """Raise `EnvironmentFault` where the extra is not installed."""
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise EnvironmentFault(
            f"--tasks needs lm-eval, and there is no module {' and '.join(missing)}",
            hint="pip install 'm27quant[eval]'",
        )


@dataclass(frozen=True, slots=True)
class TaskPlan:
    """Tasks that are there and that a server can answer."""

    options: TaskOptions
    manager: Any
    """lm-eval's, which has their definitions."""
    scored: bool
    """Log probabilities of given answers are asked for."""


def plan_tasks(options: TaskOptions, *, echoes: bool) -> TaskPlan:
    """Look for tasks and their data, before anything is computed.

    Args:
        options: what is asked.
        echoes: the server may have log probabilities of prompts; the builtin server has not.

    Raises:
        EnvironmentFault: lm-eval is not installed; a data set cannot be had.
        UsageError: no such task, or one that the server cannot answer.
    """
    require_lm_eval()
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    include = None if options.include_path is None else str(options.include_path)
    manager = TaskManager(include_path=include)
    scored = [task for task, kind in _kinds(options.tasks, manager).items() if kind in SCORED]
    _refuse_scored(scored, options, echoes)
    return TaskPlan(options, manager, bool(scored))


def run_tasks(endpoint: Endpoint, plan: TaskPlan) -> dict[str, Any]:
    """Let lm-eval ask a server.

    Returns:
        For each task: `version`, `num_samples`, `num_fewshot`, and `metrics` by lm-eval's names such as
        `exact_match,strict-match`, each with value and a 95 % interval (ends NaN where lm-eval has no standard error).

    Raises:
        EnvironmentFault: the server does not answer.
    """
    from lm_eval import simple_evaluate

    options = plan.options
    model, arguments = _client(endpoint, options, plan.scored)
    try:
        with _quiet():
            found = simple_evaluate(
                model=model,
                model_args=arguments,
                tasks=[*options.tasks],
                num_fewshot=options.num_fewshot,
                limit=options.limit,
                apply_chat_template=options.apply_chat_template,
                task_manager=plan.manager,
                log_samples=False,
                bootstrap_iters=1000,
            )
    except Exception as fault:  # of HTTP clients, data sets and tasks' own code, many libraries' kinds
        raise EnvironmentFault(
            f"lm-eval stopped: {type(fault).__name__}: {_first_line(fault)}",
            hint=f"does {endpoint.api} answer, and can the tasks' data be had?",
        ) from fault
    return read_results(found or {})


def read_results(found: Mapping[str, Any]) -> dict[str, Any]:
    """What `run_tasks` returns, from what `lm_eval.simple_evaluate` returns."""
    results: dict[str, Any] = {}
    for task, figures in found.get("results", {}).items():
        metrics = {}
        for name, value in figures.items():
            metric, comma, filtered = name.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = figures.get(f"{metric}_stderr,{filtered}")
            metrics[name] = _estimate(float(value), error, _num_samples(found, task)).to_json()
        results[task] = {
            "version": found.get("versions", {}).get(task),
            "num_samples": _num_samples(found, task),
            "num_fewshot": found.get("n-shot", {}).get(task),
            "metrics": metrics,
        }
    return results


def _num_samples(found: Mapping[str, Any], task: str) -> int | None:
    count = found.get("n-samples", {}).get(task, {}).get("effective")
    return count if isinstance(count, int) else None


def _estimate(value: float, error: object, count: int | None) -> Estimate:
    """With lm-eval's standard error; a mean of zeros and ones, which this tells, has Wilson's interval instead."""
    if not isinstance(error, int | float):
        return Estimate(value, math.nan, math.nan)
    if count is not None and count > 1 and 0 <= value <= 1:
        true = round(value * count)
        binary = math.isclose(
            error, math.sqrt(value * (1 - value) / (count - 1)), rel_tol=1e-6, abs_tol=1e-12
        )
        if binary and math.isclose(true, value * count, rel_tol=1e-9):
            return wilson(true, count)
    return Estimate(value, value - Z * error, value + Z * error)


def _client(endpoint: Endpoint, options: TaskOptions, scored: bool) -> tuple[str, dict[str, Any]]:
    """lm-eval's name of a client, and its arguments.  Text goes over the wire as text, but for what is scored."""
    chat = options.apply_chat_template
    arguments: dict[str, Any] = {
        "model": endpoint.model,
        "base_url": f"{endpoint.api}/{'chat/completions' if chat else 'completions'}",
        "num_concurrent": options.num_concurrent,
        "max_retries": 3,
        "eos_string": END_OF_TURN,
        "tokenizer_backend": "huggingface" if scored else "none",
        "tokenized_requests": scored,
    }
    if scored:
        arguments["tokenizer"] = str(endpoint.tokenizer)
    return ("local-chat-completions" if chat else "local-completions"), arguments


def _kinds(tasks: Sequence[str], manager: Any) -> dict[str, str]:
    """Task -> lm-eval's output type, groups resolved."""
    from lm_eval.tasks import get_task_dict

    if unknown := [task for task in tasks if not manager.match_tasks([task])]:
        raise UsageError(
            f"no task {', '.join(map(escape, unknown))} in lm-eval",
            hint="`lm-eval ls tasks` lists those there are",
        )
    try:
        with _quiet():
            return dict(_flat(get_task_dict([*tasks], manager)))
    except Exception as fault:  # a task's data set is loaded here, from the Hub or wherever it says
        raise EnvironmentFault(
            f"lm-eval cannot load {', '.join(map(escape, tasks))}: {type(fault).__name__}: {_first_line(fault)}",
            hint="can the tasks' data be had from here?",
        ) from fault


def _flat(tasks: Mapping[Any, Any]) -> Iterator[tuple[str, str]]:
    for name, task in tasks.items():
        if isinstance(task, Mapping):
            yield from _flat(task)
        else:
            yield str(name), str(getattr(task, "OUTPUT_TYPE", ""))


def _refuse_scored(scored: Sequence[str], options: TaskOptions, echoes: bool) -> None:
    if scored and (options.apply_chat_template or not echoes):
        what = "chat completions have" if options.apply_chat_template else "the builtin server has"
        more = f" and {len(scored) - 3} more" if len(scored) > 3 else ""
        raise UsageError(
            f"{', '.join(map(escape, scored[:3]))}{more}: given answers are scored, and {what} no log probabilities "
            "of prompts",
            hint="take a task whose answers are generated, such as gsm8k or mmlu_generative, "
            "or --base-url of a server whose /completions does `echo` with `logprobs`, such as vLLM",
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval and its libraries print and draw bars, in between what a command has to say."""
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def _first_line(fault: BaseException) -> str:
    return escape(str(fault).partition("\n")[0], 300)
