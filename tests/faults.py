"""A proxy in front of an S3 server, with the faults of busy stores and networks."""

import asyncio
import random
import threading
from collections import Counter
from contextlib import contextmanager

from aiohttp import ClientSession, ClientTimeout, DummyCookieJar, TCPConnector, web
from yarl import URL

SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
BROKEN = b"<Error><Code>InternalError</Code><Message>We encountered an internal error.</Message></Error>"
KINDS = ("throttle", "reset", "delay", "truncate", "lost answer")


class FaultProxy:
    """Forwards requests unchanged, so that signatures stay valid, except for a share of them.

    Args:
        target: endpoint of the server.
        rate: share of requests with a fault of a random kind.
        seed: of the draws.
        broken: requests whose path ends with this are always throttled.

    Requests whose path starts with `throttled` are throttled for as long as it is set.
    """

    def __init__(self, target: str, rate: float = 0.0, seed: int = 0, broken: str | None = None):
        self.target, self.rate, self.broken = target, rate, broken
        self.random, self.met = random.Random(seed), Counter()
        self.throttled: str | None = None

    async def handle(self, request: web.Request) -> web.StreamResponse:
        kind = self.random.choice(KINDS) if self.random.random() < self.rate else "none"
        if self.broken and request.path.endswith(self.broken):
            kind = "throttle"
        if self.throttled and request.path.startswith(self.throttled):
            kind = "throttled prefix"
        body = await request.read()
        self.met[kind] += 1
        if kind.startswith("throttle"):
            return web.Response(status=503, body=SLOW_DOWN, content_type="application/xml")
        if kind == "reset":
            request.transport.abort()
            return web.Response()
        if kind == "delay":
            await asyncio.sleep(self.random.uniform(0.2, 1.5))
        status, headers, answer = await self._forward(request, body)
        if kind == "lost answer":  # the server did it, but the client hears that it failed
            return web.Response(status=500, body=BROKEN, content_type="application/xml")
        if kind == "truncate" and request.method == "GET" and len(answer) > 1:
            return await self._truncated(request, status, headers, answer)
        response = web.Response(status=status, headers=headers, body=answer)
        if request.method == "HEAD":
            response.headers["Content-Length"] = headers.get("Content-Length", "0")
        return response

    async def _forward(self, request, body):
        # A connection for each request: after a killed server none would be reusable.
        connector = TCPConnector(force_close=True)
        async with ClientSession(
            connector=connector, auto_decompress=False, cookie_jar=DummyCookieJar(), timeout=ClientTimeout(total=60)
        ) as session:
            url = URL(self.target + request.raw_path, encoded=True)
            async with session.request(
                request.method, url, headers=request.headers, data=body, allow_redirects=False
            ) as answer:
                headers = {
                    k: v for k, v in answer.headers.items() if k.lower() not in ("transfer-encoding", "connection")
                }
                return answer.status, headers, await answer.read()

    async def _truncated(self, request, status, headers, answer):
        response = web.StreamResponse(status=status, headers=headers)
        response.content_length = len(answer)
        await response.prepare(request)
        await response.write(answer[: len(answer) // 2])
        request.transport.abort()
        return response


@contextmanager
def proxying(target: str, **faults):
    """Runs a proxy; yields it and its endpoint."""
    proxy, ready, ending = FaultProxy(target, **faults), threading.Event(), asyncio.Event()
    found: dict = {}

    async def serve():
        application = web.Application(client_max_size=1 << 30)
        application.router.add_route("*", "/{path:.*}", proxy.handle)
        runner = web.AppRunner(application, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        found["loop"] = asyncio.get_running_loop()
        found["endpoint"] = f"http://127.0.0.1:{runner.addresses[0][1]}"
        ready.set()
        await ending.wait()
        await runner.cleanup()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert ready.wait(30)
    try:
        yield proxy, found["endpoint"]
    finally:
        found["loop"].call_soon_threadsafe(ending.set)
        thread.join(30)
