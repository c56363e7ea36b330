"""lm-eval's entry points with the signatures of 0.4.13, and three tasks; its questions go over real HTTP.

Written as the package `lm_eval` into a folder that a test puts on its path.
"""

from __future__ import annotations

from pathlib import Path

PACKAGE = """
import json
import os
import urllib.request

CALLS = []


def simple_evaluate(
    model, model_args=None, tasks=None, num_fewshot=None, batch_size=None, max_batch_size=None, device=None,
    use_cache=None, cache_requests=False, rewrite_requests_cache=False, delete_requests_cache=False, limit=None,
    samples=None, bootstrap_iters=100000, check_integrity=False, write_out=False, log_samples=True,
    evaluation_tracker=None, system_instruction=None, apply_chat_template=False, fewshot_as_multiturn=True,
    gen_kwargs=None, task_manager=None, verbosity=None, predict_only=False, random_seed=0, numpy_random_seed=1234,
    torch_random_seed=1234, fewshot_random_seed=1234, confirm_run_unsafe_code=False, metadata=None,
):
    CALLS.append({"model": model, "model_args": model_args, "tasks": tasks, "num_fewshot": num_fewshot})
    count = limit or 8
    lengths = []
    for n in range(count):
        asked = {"model": model_args["model"], "max_tokens": 4, "temperature": 0}
        asked |= {"messages": [{"role": "user", "content": "Hi"}]} if apply_chat_template else {"prompt": "import "}
        request = urllib.request.Request(
            model_args["base_url"], json.dumps(asked).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
            lengths.append(json.load(answer)["usage"]["completion_tokens"])
    right = sum(length == 4 for length in lengths) - 1
    share = right / count
    return {
        "results": {
            "words": {
                "alias": "words", "exact_match,none": share,
                "exact_match_stderr,none": (share * (1 - share) / (count - 1)) ** 0.5,
                "bleu,none": 12.5, "bleu_stderr,none": 0.5, "f1,none": 0.25, "f1_stderr,none": "N/A",
            }
        },
        "versions": {"words": 1.0}, "n-shot": {"words": num_fewshot or 0},
        "n-samples": {"words": {"original": 8, "effective": count}},
    }
"""
TASKS = """
class TaskManager:
    def __init__(self, verbosity=None, include_path=None, include_defaults=True, metadata=None):
        self.include_path = include_path

    def match_tasks(self, task_list):
        return [task for task in task_list if task in ("words", "choice", "group", "remote")]


class Task:
    def __init__(self, kind):
        self.OUTPUT_TYPE = kind


def get_task_dict(task_name_list, task_manager=None):
    if "remote" in task_name_list:
        raise ConnectionError("cannot reach the Hub")
    own = {"words": Task("generate_until"), "choice": Task("multiple_choice")}
    return {name: {"inner": {"choice": own["choice"]}} if name == "group" else own[name] for name in task_name_list}
"""


def write_to(folder: Path) -> None:
    """The package, and the two modules that its extra `api` brings."""
    package = folder / "lm_eval"
    package.mkdir()
    (package / "__init__.py").write_text(PACKAGE)
    (package / "tasks.py").write_text(TASKS)
    for name in ("aiohttp", "tenacity"):
        (folder / f"{name}.py").write_text("")
