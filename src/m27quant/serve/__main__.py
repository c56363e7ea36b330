"""`python -m m27quant.serve CHECKPOINT`: the builtin server with few options."""

from __future__ import annotations

import argparse
import os
import sys


def main() -> int:
    """Serve; errors end as in `m27quant`."""
    parser = argparse.ArgumentParser(prog="python -m m27quant.serve", description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--drafter")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--served-model-name")
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--max-queue", type=int, default=256)
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--request-timeout", type=float, default=3600.0)
    parser.add_argument("--no-verify", action="store_true")
    args = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from m27quant.errors import M27Error
    from m27quant.runtime.options import RunOptions
    from m27quant.serve.server import ServerOptions, serve

    try:
        return serve(
            args.checkpoint,
            RunOptions(max_num_seqs=args.max_num_seqs, max_model_len=args.max_model_len),
            args.drafter,
            ServerOptions(
                host=args.host, port=args.port, api_key=os.environ.get("M27QUANT_API_KEY"),
                served_model_name=args.served_model_name, max_queue=args.max_queue,
                request_timeout_s=args.request_timeout,
            ),
            say=lambda line: print(line, file=sys.stderr, flush=True),  # noqa: T201
            check=not args.no_verify,
        )  # fmt: skip
    except M27Error as fault:
        print(f"error: {fault.message}", file=sys.stderr)  # noqa: T201
        return fault.exit_code


if __name__ == "__main__":
    sys.exit(main())
