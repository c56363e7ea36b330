"""docs/serving.md from the flags' own data: what is passed, when and why."""

from __future__ import annotations

from collections.abc import Iterator

from m27quant.serve.engines_data import (
    DRAFT_CACHE_WHY,
    GPUS_PER_NODE,
    NEVER,
    V2_RUNNER,
    VERSIONS,
    EngineVersion,
    share_of,
)
from m27quant.serve.memory_fit import GIB, GRAPHS, LARGE_STEP, LEAST_CONTEXT, SMALL_STEP, STEP
from m27quant.verify.engines_data import GPUS

HEADER = """\
# Serving

Written by `make docs` from the data that `m27quant serve` decides by; a test compares the two.

```
m27quant serve ./m27-nvfp4 --engine vllm --gpu b200 --tp 2 --print     # the command, checked, a reason for each flag
m27quant serve ./m27-nvfp4 --engine vllm --drafter ./m27-dflash        # becomes vLLM, if it is installed
m27quant serve ./m27-nvfp4 --engine sglang --gpu h200 --tp 2 --compose deploy   # compose.yaml, kubernetes.yaml
m27quant serve ./m27-nvfp4 --engine builtin                            # the server that comes with m27quant
```

With `--print` stdout holds the command alone, quoted for a POSIX shell: `sh -c "$(m27quant serve ... --print)"` runs
it. The reasons go to stderr; `--json` has both. Without `--gpu` nvidia-smi is asked what this machine has.

## What is checked first
All that `m27quant verify --engine ENGINE --gpu GPU --tp N --drafter DRAFTER` checks, scales included (`--quick` leaves
those out). An error ends in exit code 1 with the names of the checks, for `--print` and `--compose`, too; so does a
model that leaves no room for the context. Warnings are said and do not stop anything.

## What is known and what is not
* The flags are those of {versions}. `python -m tests.serve.check_flags` reads the wheels of these
  versions as files and compares: every option, backend, parser and key below is one that they know. Another version
  that is found installed is named before the start.
* Which kernel and attention an engine takes on a GPU was read in its source, and not seen on one. The commands were
  not run on GPUs here. Container images go by the projects' scheme of tags; they were not pulled.

## Context and memory
On the fullest GPU, in bytes: weights as `verify` counts them, plus the drafter (counted whole, though engines cut most
of it), plus, for vLLM, whose share includes them, activations of a step of {large:,} tokens ({gpu:,} on smaller GPUs,
{small:,} on GB10) and {graphs:g} GiB for graphs and workspaces. The rest of the share, divided by the bytes of a
token's keys and values, is the cache of all requests together. The context is the model's limit, or what fits, rounded
down; if that is under {least:,} tokens, the launch is refused. M2.7 has 134.5 GB of weights and 124 KiB of FP8 cache a
token, both divided by the tensor-parallel size; without `--tp` the smallest size that fits is taken.

{gpus}
"""

CAN = (
    ("DFlash", "yes; it adds one to `target_layer_ids` itself",
     "refused: MiniMax-M2 has no `set_dflash_layers_to_capture`", "yes"),
    ("EAGLE3, a chain", "yes", "yes", "yes"),
    ("EAGLE3, a tree (`--eagle-topk`)", "no, it drafts chains alone",
     "yes; with `flashinfer` attention, as `trtllm_mha` takes chains alone", "yes"),
    ("prompt lookup (`ngram`)", "not offered here", "not offered here", "yes"),
    ("EAGLE3 taps nested in `eagle_config`",
     "V1 runner: one layer early (vllm#43671); V2: ignored, its defaults 2, N/2, N-3",
     "each plus one", "each plus one"),
    ("EAGLE3 taps at the top level", "as they are", "ignored, its defaults", "as they are"),
)  # fmt: skip
"""What a drafter is to vLLM, SGLang and the builtin server."""

DRAFTERS = """\
An EAGLE3 drafter whose taps are nested alone, and are V2's defaults, gets `{name}={value}` in front
of vLLM's command. Where they are others, a warning says so, and what to add to its config.json; a wrong tap costs
acceptance, never correctness.

In vLLM DFlash runs with FLASH_ATTN, and beside a target with an FP8 cache with {cache}.
A drafter that `verify --drafter` finds errors in is refused.

"""

REST = """\
## Several machines
A GB10 is alone in its machine, a GB200 tray has four GPUs, the others have eight. Where `--tp` asks for more, the
command is for one machine: start it on each with its own `--node-rank` and the same `--master-addr`.

## API key
`--api-key` or, better, the variable `M27QUANT_API_KEY`. A printed command names the variable and never the key: vLLM
gets it as `VLLM_API_KEY`, SGLang, which takes a flag alone, as `--api-key "$M27QUANT_API_KEY"`. compose.yaml takes it
from the environment (`docker inspect` shows it), kubernetes.yaml from the Secret `m27quant`. All three servers protect
`/v1` with it, and not `/health`.

## Files for containers
`--compose DIR` writes `compose.yaml` (one service) and `kubernetes.yaml` (a Deployment and a Service): GPUs as
reserved devices and as `nvidia.com/gpu`, the checkpoint read-only at `/models/target`, 32 GiB of shared memory, probes
on `/health` that give loading an hour. `--image` takes another image. The port is published where `--host` says,
127.0.0.1 unless told otherwise.

## The builtin server
One machine, the bundled runtime, the extra `serve` (`pip install 'm27quant[serve]'`); [server.md](server.md) has its
paths, limits and metrics. It serves FP8 and BF16 checkpoints, too.

## To and from the Hub
```
m27quant push ./m27-nvfp4 my-org/MiniMax-M2.7-NVFP4 --private --dry-run   # files, sizes, SHA-256; the Hub is not asked
m27quant push ./m27-nvfp4 my-org/MiniMax-M2.7-NVFP4 --create-pr
m27quant pull my-org/MiniMax-M2.7-NVFP4@v1 ./m27-nvfp4
```

`push` goes on only if `verify` finds no error (`--no-verify` is said aloud), the model card's front matter and links
hold, and the folder has nothing but the checkpoint's files, without anything that looks like a credential. Weights go
first; config.json and the index follow in the last commit, which is refused where somebody else has committed in
between. The same command goes on with an upload that was cut short. A repository with other weights is refused.

`pull` resolves the revision to a commit, which `OUT/.m27quant/pull.json` records, downloads into `OUT/.m27quant/pull`,
compares sizes (with `--full` SHA-256, too), verifies, and only then moves the files to OUT, config.json and the index
last.
"""


def serving() -> str:
    """The whole of docs/serving.md."""
    return "".join(_parts())


def _parts() -> Iterator[str]:
    yield HEADER.format(
        versions=" and ".join(engine.shown for engine in VERSIONS.values()), large=LARGE_STEP, gpu=STEP,
        small=SMALL_STEP, graphs=GRAPHS / GIB, least=LEAST_CONTEXT, gpus="".join(_gpus()),
    )  # fmt: skip
    for engine in VERSIONS.values():
        yield from _engine(engine)
    yield "## Left out on purpose\n\n| flag | why |\n|---|---|\n"
    yield from (f"| `{name}` | {why} |\n" for name, why in NEVER.items())
    yield "\n## Drafters\n\n| | vLLM 0.33 | SGLang 0.5.23 | builtin |\n|---|---|---|---|\n"
    yield from (f"| {' | '.join(row)} |\n" for row in CAN)
    yield "\n" + DRAFTERS.format(name=V2_RUNNER[0], value=V2_RUNNER[1], cache=DRAFT_CACHE_WHY)
    yield REST


def _gpus() -> Iterator[str]:
    yield "| `--gpu` | memory | in one machine |"
    yield "".join(f" {engine.shown}'s share |" for engine in VERSIONS.values()) + "\n|---|---|---|"
    yield "---|" * len(VERSIONS) + "\n"
    for gpu in GPUS.values():
        shares = "".join(f" {share_of(e, gpu) * gpu.memory_bytes / GIB:.1f} GiB |" for e in VERSIONS.values())
        yield (
            f"| `{gpu.name}` | {gpu.memory_bytes / GIB:.1f} GiB | {GPUS_PER_NODE.get(gpu.name, 8)} |{shares}\n"
        )


def _engine(engine: EngineVersion) -> Iterator[str]:
    yield f"## {engine.shown}\n\n"
    yield f"`{' '.join(engine.program)} CHECKPOINT`, from `pip install {engine.package}` or the image "
    yield f"`{engine.image}`.\n\n"
    yield "| flag | passed | why |\n|---|---|---|\n"
    for flag in engine.flags.values():
        shown = " ".join([flag.name, *flag.values])
        yield f"| `{shown}` | {_cell(flag.when)} | {_cell(flag.why)} |\n"
    yield "\n"


def _cell(text: str) -> str:
    """What Markdown would take for a tag is text."""
    return text.replace("<", "\\<")
