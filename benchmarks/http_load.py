"""Load for a server of OpenAI's interface: so many clients, each with one request after another.

    python -m benchmarks.http_load PORT < requests.json

Reads {"bodies": [one JSON body a request], "clients": how many, "path": "/v1/completions"} from stdin and writes
seconds, tokens and the median time to the first token to stdout.  It shares the machine with what it measures, so
it does as little as it can: it looks for the end of an answer, and reads no more than that.
"""

from __future__ import annotations

import asyncio
import json
import re
import statistics
import sys
import time
from collections import deque

END, TOKENS = b"\r\n0\r\n\r\n", re.compile(rb'"completion_tokens":(\d+)')


class Client(asyncio.Protocol):
    """One connection: asks, waits for the end, asks again."""

    def __init__(self, port: int, path: str, bodies: deque[bytes], done: asyncio.Event) -> None:
        self._head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        self._bodies, self._done = bodies, done
        self.num_tokens = 0
        self.first_token_s: list[float] = []
        self._tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._ask()

    def _ask(self) -> None:
        if not self._bodies:
            self._transport.close()
            self._done.set()
            return
        body = self._bodies.popleft()
        self._asked, self._tail, self._length = time.perf_counter(), b"", 0
        self._transport.write(f"{self._head}Content-Length: {len(body)}\r\n\r\n".encode() + body)

    def data_received(self, data: bytes) -> None:
        if not self._tail:
            self.first_token_s.append(time.perf_counter() - self._asked)
            if not data.startswith(b"HTTP/1.1 200"):
                raise SystemExit(f"not answered: {data[:500]!r}")
            found = re.search(rb"content-length: (\d+)", data)
            self._length = data.index(b"\r\n\r\n") + 4 + int(found[1]) if found else 0
        self._length -= len(data)
        self._tail = (self._tail + data)[-2000:]
        if self._length == 0 or self._tail.endswith(END):
            self.num_tokens += int(TOKENS.findall(self._tail)[-1])
            self._ask()


async def load(port: int, path: str, bodies: list[bytes], num_clients: int) -> dict[str, float]:
    """Seconds from the first request to the last answer, tokens of all answers, the median time to the first."""
    loop, queue = asyncio.get_running_loop(), deque(bodies)
    ends = [asyncio.Event() for _ in range(num_clients)]
    started = time.perf_counter()
    clients = [
        (await loop.create_connection(lambda end=end: Client(port, path, queue, end), "127.0.0.1", port))[1]
        for end in ends
    ]
    await asyncio.gather(*(end.wait() for end in ends))
    seconds = time.perf_counter() - started
    first = statistics.median(s for client in clients for s in client.first_token_s)
    return {"seconds": seconds, "tokens": sum(c.num_tokens for c in clients), "first_token_s": first}


def main() -> None:
    asked = json.load(sys.stdin)
    bodies = [json.dumps(body).encode() for body in asked["bodies"]]
    print(json.dumps(asyncio.run(load(int(sys.argv[1]), asked["path"], bodies, asked["clients"]))))


if __name__ == "__main__":
    main()
