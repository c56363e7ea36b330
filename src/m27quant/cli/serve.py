"""`m27quant serve`: vLLM or SGLang with the right flags, or the builtin server."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from m27quant.cli import options as shared
from m27quant.cli import run_options as opt
from m27quant.cli import serve_options as ask
from m27quant.cli.output import Output
from m27quant.cli.verifying import given
from m27quant.errors import UsageError

if TYPE_CHECKING:
    from m27quant.serve.launch import Launch, LaunchOptions


def serve(
    checkpoint: ask.Checkpoint,
    engine: ask.Engine = "vllm",
    drafter: ask.Drafter = None,
    print_only: ask.Print = False,
    quick: ask.Quick = False,
    host: ask.Host = "127.0.0.1",
    port: ask.Port = 8000,
    api_key: ask.ApiKey = None,
    served_model_name: ask.ServedModelName = None,
    max_model_len: ask.MaxModelLen = None,
    max_num_seqs: ask.MaxNumSeqs = None,
    gpu: ask.Gpu = None,
    tp: ask.TensorParallel = None,
    ep: ask.ExpertParallel = None,
    gpu_memory_utilization: ask.MemoryShare = None,
    node_rank: ask.NodeRank = 0,
    master_addr: ask.MasterAddr = None,
    num_draft_tokens: opt.NumDraftTokens = None,
    num_steps: opt.NumSteps = None,
    eagle_topk: opt.EagleTopk = None,
    revision: shared.Revision = None,
    offline: shared.Offline = False,
    token: shared.HubToken = None,
    json: shared.Json = False,
    quiet: shared.Quiet = False,
    verbose: shared.Verbose = 0,
) -> None:
    """Serve a checkpoint over OpenAI's HTTP interface.

    The checkpoint is checked for the engine first; exit code 1: it has errors, or does not fit.  --print writes the
    command alone to stdout, and a reason for each flag to stderr.

    Examples:
      m27quant serve ./m27-nvfp4 --engine vllm --gpu b200 --tp 2 --print

      m27quant serve ./m27-nvfp4 --engine vllm --drafter ./m27-dflash

      sh -c "$(m27quant serve ./m27-nvfp4 --engine sglang --gpu rtx-pro-6000 --tp 4 --print)"
    """
    output = Output.open(json=json, quiet=quiet, verbose=verbose)
    drafting = given(num_draft_tokens=num_draft_tokens, num_steps=num_steps, eagle_topk=eagle_topk)
    if drafting and drafter is None:
        raise UsageError("options for a drafter, but no drafter", hint="name one with --drafter")
    if engine == "builtin":
        raise UsageError("--engine builtin is not there yet")
    from m27quant.serve.launch import LaunchOptions
    from m27quant.serve.speculation import Wish

    launch = _plan(
        output,
        checkpoint,
        LaunchOptions(
            engine=engine, gpu=gpu, tp=tp, ep=ep, drafter=drafter,  # type: ignore[arg-type]  # checked by its parser
            wish=Wish(num_draft_tokens=num_draft_tokens, num_steps=num_steps, eagle_topk=eagle_topk),
            host=host, port=port, served_name=served_model_name, max_model_len=max_model_len,
            max_num_seqs=max_num_seqs, memory_share=gpu_memory_utilization, has_key=api_key is not None,
            node_rank=node_rank, master=master_addr, level="quick" if quick else "default",
            revision=revision, offline=offline, token=token.reveal() if token else None,
        ),
    )  # fmt: skip
    if print_only:
        output.result(launch.document(), human=launch.shell(), quiet=launch.shell())
        return
    _start(output, launch, api_key.reveal() if api_key else None)


def _plan(output: Output, checkpoint: str, options: LaunchOptions) -> Launch:
    """The command, its reasons and what is to be known before the start."""
    from m27quant.serve.launch import plan_launch

    launch = plan_launch(checkpoint, options, say=output.status)
    for finding in launch.findings:
        if finding.severity == "warning":
            output.warning(f"{finding.check.code}: {finding.message}")
    for note in launch.notes:
        output.warning(note)
    if not output.silent and output.mode == "human":
        output.status(f"{launch.engine.shown} on {launch.setup.gpu.name}; why each flag:")
        for name, value in launch.environment.items():
            output.status(f"  {name}={value}  {launch.reasons[name]}")
        for choice in launch.choices:
            output.status(f"  {choice.flag.name}  {choice.why}")
    return launch


def _start(output: Output, launch: Launch, key: str | None) -> None:
    """Become the engine."""
    from m27quant.serve.installed import find_engine

    program = find_engine(launch, output.warning)
    environment = {**os.environ, **launch.environment}
    if key is not None and launch.engine.key_variable is not None:
        environment[launch.engine.key_variable] = key
    argv = launch.argv(key)
    output.status(f"starting {launch.engine.shown}")
    os.execve(program, [program, *argv[1:]], environment)
