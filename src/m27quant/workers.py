"""Quantizing with all of one machine without a launcher: this process is the first rank and starts the others.

A worker is `python -m m27quant.workers`; what to do comes as one JSON line on its stdin, so that a token is on nobody's
list of processes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType

import torch

from m27quant.calib.memory import threads
from m27quant.distributed.join import LOOPBACK, Meeting, call, is_launched, join
from m27quant.distributed.ranks import ALONE, Ranks
from m27quant.errors import EnvironmentFault, Interrupted, M27Error, UsageError
from m27quant.prepare import Options
from m27quant.quantize import quantize_checkpoint

END_S = 10
"""Seconds that workers have to end before they are killed."""


@contextmanager
def working_together(
    model: str, out: Path, options: Options, num_processes: int | None, stop: Callable[[], None]
) -> Iterator[tuple[Ranks, Options]]:
    """This process among all that quantize MODEL, and its own options: torchrun's ranks, or one per GPU, or alone.

    Args:
        model: as in `quantize_checkpoint`, which the others call with the same arguments.
        out: so too.
        options: so too, but for the device.
        num_processes: so many on this machine; None takes one per GPU that is visible, or this one alone.
        stop: raises when waiting for the others should end.

    Raises:
        UsageError: more processes than GPUs; `num_processes` beside torchrun.
        EnvironmentFault: a process cannot be started or reached.
    """
    workers: list[subprocess.Popen[bytes]] = []
    if is_launched():
        if num_processes:
            raise UsageError("--num-processes beside torchrun", hint="give torchrun --nproc-per-node instead")
        ranks = join(stop)
        options = replace(options, device=device_of(options.device, int(os.environ.get("LOCAL_RANK", "0"))))
    else:
        count = count_of_ranks(options, num_processes)
        ranks, workers = _spawned(count, model, out, options, stop) if count > 1 else (ALONE, workers)
        if workers:
            options = replace(options, device=device_of(options.device, 0))
    try:
        yield ranks, options
        ranks.say_goodbye()
    except BaseException as fault:
        ranks.fail(fault)
        raise
    finally:
        ranks.close()
        _end(workers)


def count_of_ranks(options: Options, num_processes: int | None) -> int:
    """How many processes `working_together` would have."""
    if is_launched():
        return int(os.environ["WORLD_SIZE"])
    return num_processes or _visible_gpus(options.device)


def device_of(name: str, local_rank: int) -> str:
    """`auto` and `cuda` are the rank's own GPU, where there is one."""
    on_gpu = name == "cuda" or (name == "auto" and torch.cuda.is_available())
    return f"cuda:{local_rank}" if on_gpu else name


def _visible_gpus(device: str) -> int:
    return torch.cuda.device_count() if device in ("auto", "cuda") and torch.cuda.is_available() else 1


def _spawned(
    count: int, model: str, out: Path, options: Options, stop: Callable[[], None]
) -> tuple[Ranks, list[subprocess.Popen[bytes]]]:
    if device_of(options.device, 0).startswith("cuda"):
        if options.device.startswith("cuda:") or count > torch.cuda.device_count():
            raise UsageError(
                f"{count} processes on --device {options.device}, with {torch.cuda.device_count()} visible GPUs",
                hint="one process takes one GPU: lower --num-processes, or use --device cuda",
            )
    else:  # side by side they share the cores
        torch.set_num_threads(max(1, min(torch.get_num_threads(), threads() // count)))
    meeting = Meeting()
    workers: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(1, count):
            task = {
                "place": [LOOPBACK, meeting.port, meeting.secret, rank, count, count],
                "model": model,
                "out": str(out),
                "options": asdict(replace(options, device=device_of(options.device, rank))),
                "threads": torch.get_num_threads(),
            }
            workers.append(_start(task))

        def look() -> None:
            stop()
            for rank, worker in enumerate(workers, start=1):
                if (code := worker.poll()) is not None:
                    raise EnvironmentFault(
                        f"rank {rank} of {count} (process {worker.pid}) ended before it began, exit code {code}",
                        hint="see above what it said; is there enough memory for so many processes?",
                    )

        return meeting.open(count, look, local_size=count), workers
    except BaseException:
        for worker in workers:
            worker.kill()
        _end(workers)
        raise


def _start(task: dict[str, object]) -> subprocess.Popen[bytes]:
    try:
        worker = subprocess.Popen(
            [sys.executable, "-m", "m27quant.workers"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        )
    except OSError as fault:
        raise EnvironmentFault(
            f"a worker cannot be started: {fault.strerror}", hint="lower --num-processes"
        ) from None
    assert worker.stdin is not None
    with suppress(BrokenPipeError), worker.stdin as stdin:  # who is gone already is noticed at the meeting
        stdin.write(json.dumps(task).encode() + b"\n")
    return worker


def _end(workers: list[subprocess.Popen[bytes]]) -> None:
    for worker in workers:
        try:
            worker.wait(END_S)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()


# -- the worker's side -----------------------------------------------------------------------------


def main() -> int:
    """One worker: does what its line says and returns the exit code."""
    came: list[int] = []

    def handle(signum: int, frame: FrameType | None) -> None:
        came.append(signum)

    def stop() -> None:
        if came:
            raise Interrupted(f"stopped by {signal.Signals(came[0]).name}", signum=came[0])

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the first rank will say
    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGHUP, handle)
    task = json.loads(sys.stdin.readline())
    torch.set_num_threads(task["threads"])
    ranks = ALONE
    try:
        ranks = call(*task["place"])
        quantize_checkpoint(task["model"], task["out"], Options(**task["options"]), stop=stop, ranks=ranks)
        ranks.say_goodbye()
    except M27Error as fault:
        if ranks.is_spokesman:
            sys.stderr.write(f"error: {fault.message}\nhint: {fault.hint}\n")
        return fault.exit_code
    finally:
        ranks.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
