"""`m27quant serve`: vLLM or SGLang with the right flags, or the builtin server."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from m27quant.cli import options as shared
from m27quant.cli import run_options as opt
from m27quant.cli import serve_options as ask
from m27quant.cli.output import Mode, Output
from m27quant.cli.verifying import given
from m27quant.errors import UsageError

if TYPE_CHECKING:
    from m27quant.serve.launch import Launch, LaunchOptions


def serve(
    checkpoint: ask.Checkpoint,
    engine: ask.Engine,
    drafter: ask.Drafter = None,
    print_only: ask.Print = False,
    compose: ask.Compose = None,
    image: ask.Image = None,
    overwrite: ask.Overwrite = False,
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
    drafter_tap_offset: opt.TapOffset = None,
    drafter_rope_theta: opt.RopeTheta = None,
    max_queue: ask.MaxQueue = None,
    max_tokens: ask.MaxTokens = None,
    max_choices: ask.MaxChoices = None,
    max_body: ask.MaxBody = None,
    request_timeout: ask.RequestTimeout = None,
    drain_timeout: ask.DrainTimeout = None,
    cors_origin: ask.CorsOrigin = None,
    no_chat_page: ask.NoChatPage = False,
    device: shared.Device = "auto",
    dtype: opt.Dtype = "bfloat16",
    activations: opt.Activations = "auto",
    kv_cache_dtype: opt.KvCacheDtype = "auto",
    invariant: opt.Invariant = None,
    max_memory: shared.MaxMemory = None,
    no_verify: opt.NoVerify = False,
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

      m27quant serve ./m27-nvfp4 --engine vllm --gpu h200 --tp 2 --compose deploy

      m27quant serve ./m27-nvfp4 --engine builtin --drafter ./m27-dflash
    """
    output = Output.open(json=json, quiet=quiet, verbose=verbose)
    drafting = given(num_draft_tokens=num_draft_tokens, num_steps=num_steps, eagle_topk=eagle_topk)
    own_drafting = given(tap_offset=drafter_tap_offset, rope_theta=drafter_rope_theta)
    if (drafting or own_drafting) and drafter is None:
        raise UsageError("options for a drafter, but no drafter", hint="name one with --drafter")
    if print_only and compose is not None:
        raise UsageError("--print and --compose exclude each other")
    hub = given(revision=revision, token=token.reveal() if token else None, offline=offline or None)
    key = api_key.reveal() if api_key else None
    network = {"host": host, "port": port}
    builtin_run = _changed(
        dtype=(dtype, "bfloat16"), activations=(activations, "auto"), kv_cache_dtype=(kv_cache_dtype, "auto"),
        device=(device, "auto"), invariant=(invariant, None), max_memory=(max_memory, None),
    )  # fmt: skip
    builtin_server = given(
        max_queue=max_queue, max_tokens=max_tokens, max_choices=max_choices, max_body_bytes=max_body,
        request_timeout_s=request_timeout, drain_timeout_s=drain_timeout,
        cors_origins=tuple(cors_origin) if cors_origin else None, chat_page=False if no_chat_page else None,
    )  # fmt: skip
    if engine == "builtin":
        _refuse(
            "is for vLLM and SGLang",
            gpu=gpu, tp=tp, ep=ep, gpu_memory_utilization=gpu_memory_utilization, node_rank=node_rank or None,
            master_addr=master_addr, compose=compose, image=image, overwrite=overwrite or None,
        )  # fmt: skip
        from m27quant.cli.serve_builtin import Asked, serve_builtin

        if "tap_offset" in own_drafting:
            own_drafting["tap_offset"] = opt.tap_offset(drafter_tap_offset)
        run = builtin_run | given(max_model_len=max_model_len, max_num_seqs=max_num_seqs)
        server = network | given(served_model_name=served_model_name, api_key=key) | builtin_server
        asked = Asked(
            checkpoint=checkpoint, drafter=drafter, run=run, server=server, drafting=drafting | own_drafting,
            hub=hub, quick=quick, verify=not no_verify,
        )  # fmt: skip
        serve_builtin(output, asked, print_only=print_only)
        return
    _refuse(
        "is for --engine builtin",
        **builtin_run, **builtin_server, **own_drafting, no_verify=no_verify or None,
        drafter="ngram" if drafter == "ngram" else None,
    )  # fmt: skip
    if compose is None:
        _refuse("is for --compose", image=image, overwrite=overwrite or None)
    from m27quant.serve.launch import LaunchOptions
    from m27quant.serve.speculation import Wish

    launch = _plan(
        output,
        checkpoint,
        LaunchOptions(
            engine=engine, gpu=gpu, tp=tp, ep=ep, drafter=drafter,  # type: ignore[arg-type]  # checked by its parser
            wish=Wish(num_draft_tokens=num_draft_tokens, num_steps=num_steps, eagle_topk=eagle_topk),
            host=host, port=port, served_name=served_model_name, max_model_len=max_model_len,
            max_num_seqs=max_num_seqs, memory_share=gpu_memory_utilization, has_key=key is not None,
            node_rank=node_rank, master=master_addr, level="quick" if quick else "default", revision=revision,
            offline=offline, token=token.reveal() if token else None,
        ),
    )  # fmt: skip
    if compose is not None:
        from m27quant.cli.serve_compose import write_compose

        write_compose(output, launch, compose, image=image, overwrite=overwrite)
    elif print_only:
        output.result(launch.document(), human=launch.shell(), quiet=launch.shell())
    else:
        _start(output, launch, key)


def _changed(**options: tuple[object, object]) -> dict[str, object]:
    """Options whose value is not the default beside it."""
    return {name: value for name, (value, default) in options.items() if value != default}


def _refuse(why: str, **options: object) -> None:
    """Stop at the first option that was given and does not go with the engine."""
    from m27quant.cli.serve_builtin import OPTIONS

    for name, value in options.items():
        if value is not None:
            option = OPTIONS.get(name, "--" + name.removesuffix("s").replace("_", "-"))
            spelt = {"chat_page": "--no-chat-page", "compose": "--compose", "invariant": "--invariant"}
            raise UsageError(f"{spelt.get(name, option)} {why}")


def _plan(output: Output, checkpoint: str, options: LaunchOptions) -> Launch:
    """The command, its reasons and what is to be known before the start."""
    from m27quant.serve.launch import plan_launch

    launch = plan_launch(checkpoint, options, say=output.status)
    for finding in launch.findings:
        if finding.severity == "warning":
            output.warning(f"{finding.check.code}: {finding.message}")
    for note in launch.notes:
        output.warning(note)
    if output.mode is Mode.HUMAN and not output.silent:
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
