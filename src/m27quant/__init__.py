"""MiniMax-M2.x to NVFP4: quantize, verify and run.

>>> import m27quant
>>> m27quant.quantize_checkpoint("MiniMaxAI/MiniMax-M2.7", "m27-nvfp4")  # doctest: +SKIP
>>> m27quant.verify_checkpoint("m27-nvfp4").ok  # doctest: +SKIP
True
>>> llm = m27quant.load("m27-nvfp4")  # doctest: +SKIP
>>> print(llm.generate("def fib(n):")[0].text)  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from m27quant.assemble import assemble_checkpoint
    from m27quant.bench.requests import BenchOptions
    from m27quant.bench.result import BenchResult
    from m27quant.bench.run import bench_checkpoint, bench_server
    from m27quant.checkpoint.overview import Overview, inspect_checkpoint
    from m27quant.drafters.evaluate import evaluate_drafter
    from m27quant.drafters.evaluation import EvalOptions, EvalResult
    from m27quant.drafters.generate import DataOptions, DataResult, generate_drafter_data
    from m27quant.drafters.options import TrainOptions
    from m27quant.drafters.train import TrainResult, train_drafter
    from m27quant.estimate import DryRun, dry_run
    from m27quant.evaluation.limits import Limits
    from m27quant.evaluation.result import Evaluation
    from m27quant.evaluation.run import evaluate
    from m27quant.evaluation.tasks import TaskOptions
    from m27quant.llm import load
    from m27quant.prepare import Options
    from m27quant.pull import PullOptions, PullResult, pull_checkpoint
    from m27quant.push import PushOptions, PushResult, push_checkpoint
    from m27quant.quantize import QuantizeResult, quantize_checkpoint
    from m27quant.runtime.api import LLM, GenerateResult, StreamEvent
    from m27quant.runtime.generation import SamplingParams
    from m27quant.runtime.options import RunOptions
    from m27quant.serve.launch import Launch, LaunchOptions, plan_launch
    from m27quant.verify.findings import VerifyResult
    from m27quant.verify.run import verify_checkpoint

__version__ = "0.1.0"

_LAZY = {
    "PushOptions": "m27quant.push",
    "PushResult": "m27quant.push",
    "push_checkpoint": "m27quant.push",
    "PullOptions": "m27quant.pull",
    "PullResult": "m27quant.pull",
    "pull_checkpoint": "m27quant.pull",
    "LaunchOptions": "m27quant.serve.launch",
    "Launch": "m27quant.serve.launch",
    "plan_launch": "m27quant.serve.launch",
    "BenchOptions": "m27quant.bench.requests",
    "BenchResult": "m27quant.bench.result",
    "bench_checkpoint": "m27quant.bench.run",
    "bench_server": "m27quant.bench.run",
    "DataOptions": "m27quant.drafters.generate",
    "DataResult": "m27quant.drafters.generate",
    "DryRun": "m27quant.estimate",
    "dry_run": "m27quant.estimate",
    "EvalOptions": "m27quant.drafters.evaluation",
    "EvalResult": "m27quant.drafters.evaluation",
    "Evaluation": "m27quant.evaluation.result",
    "Limits": "m27quant.evaluation.limits",
    "evaluate": "m27quant.evaluation.run",
    "evaluate_drafter": "m27quant.drafters.evaluate",
    "generate_drafter_data": "m27quant.drafters.generate",
    "GenerateResult": "m27quant.runtime.api",
    "LLM": "m27quant.runtime.api",
    "load": "m27quant.llm",
    "Options": "m27quant.prepare",
    "Overview": "m27quant.checkpoint.overview",
    "QuantizeResult": "m27quant.quantize",
    "RunOptions": "m27quant.runtime.options",
    "SamplingParams": "m27quant.runtime.generation",
    "StreamEvent": "m27quant.runtime.api",
    "TaskOptions": "m27quant.evaluation.tasks",
    "TrainOptions": "m27quant.drafters.options",
    "TrainResult": "m27quant.drafters.train",
    "VerifyResult": "m27quant.verify.findings",
    "assemble_checkpoint": "m27quant.assemble",
    "inspect_checkpoint": "m27quant.checkpoint.overview",
    "quantize_checkpoint": "m27quant.quantize",
    "train_drafter": "m27quant.drafters.train",
    "verify_checkpoint": "m27quant.verify.run",
}

__all__ = [
    "LLM",
    "BenchOptions",
    "BenchResult",
    "DataOptions",
    "DataResult",
    "DryRun",
    "EvalOptions",
    "EvalResult",
    "Evaluation",
    "GenerateResult",
    "Launch",
    "LaunchOptions",
    "Limits",
    "Options",
    "Overview",
    "PullOptions",
    "PullResult",
    "PushOptions",
    "PushResult",
    "QuantizeResult",
    "RunOptions",
    "SamplingParams",
    "StreamEvent",
    "TaskOptions",
    "TrainOptions",
    "TrainResult",
    "VerifyResult",
    "__version__",
    "assemble_checkpoint",
    "bench_checkpoint",
    "bench_server",
    "dry_run",
    "evaluate",
    "evaluate_drafter",
    "generate_drafter_data",
    "inspect_checkpoint",
    "load",
    "plan_launch",
    "pull_checkpoint",
    "push_checkpoint",
    "quantize_checkpoint",
    "train_drafter",
    "verify_checkpoint",
]


def __getattr__(name: str) -> Any:
    """Import what is asked for: `import m27quant` alone must not import torch."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
