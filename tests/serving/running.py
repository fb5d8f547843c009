"""A server in this process: the real application on a real socket, in a thread of its own."""

import asyncio
import contextlib
import json
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx

from onerec_hf.serving.app import create_app
from onerec_hf.serving.models import ServedModel
from onerec_hf.serving.server import create_server, listen
from onerec_hf.serving.service import RecommendationService
from onerec_hf.serving.settings import ServingSettings


class Running:
    """`url` of the server, its `service` and `server`; `hold` keeps the next batches from being computed until `release`."""

    def __init__(self, folder, token=None, drain_timeout=30.0, unknown="skip", **settings):
        self.folder, self.token, self.drain_timeout, self.unknown = folder, token, drain_timeout, unknown
        self.settings = ServingSettings(**settings)
        self._open = threading.Event()
        self._open.set()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self.failed = None
        # A connection for each request: none is taken up again that the server is about to close.
        self.client = httpx.Client(timeout=60, limits=httpx.Limits(max_keepalive_connections=0), trust_env=False)

    async def _serve(self):
        try:
            bound = listen("127.0.0.1", 0)
            self.url = f"http://127.0.0.1:{bound.getsockname()[1]}"
            self.service = RecommendationService(
                ServedModel.load(str(self.folder)),
                self.settings,
                lambda version: ServedModel.load(str(self.folder), unless=version),
                self.unknown,
            )
            compute = self.service.batcher._compute

            def held(key, rows, step):
                assert self._open.wait(60)
                return compute(key, rows, step)

            self.service.batcher._compute = held
            self.server = create_server(create_app(self.service, self.token), self.service, self.drain_timeout)
            await self.server.serve([bound])
        except BaseException as error:
            self.failed = error
            raise

    def __enter__(self):
        self._thread.start()
        end = time.monotonic() + 60
        while not (getattr(self, "server", None) and self.server.started):
            assert self.failed is None, self.failed
            assert time.monotonic() < end
            time.sleep(0.01)
        return self

    def __exit__(self, *exc):
        self.release()
        self.stop()
        self._thread.join(60)
        assert not self._thread.is_alive()
        self.client.close()

    def hold(self):
        self._open.clear()

    def release(self):
        self._open.set()

    def stop(self):
        """What SIGTERM does."""
        with contextlib.suppress(RuntimeError):  # it has ended
            self.server.handle_exit(signal.SIGTERM, None)

    @property
    def stopped(self):
        return not self._thread.is_alive()

    def post(self, body, path="/recommend", **kwargs):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"content-type": "application/json"} | kwargs.pop("headers", {})
        if self.token and "authorization" not in headers:
            headers["authorization"] = f"Bearer {self.token}"
        return self.client.post(self.url + path, content=content, headers=headers, **kwargs)

    def get(self, path, **kwargs):
        return self.client.get(self.url + path, **kwargs)

    def post_all(self, bodies):
        """Sends requests at once, a thread each; their responses in order."""
        with ThreadPoolExecutor(len(bodies)) as pool:
            return list(pool.map(self.post, bodies))

    def metric(self, name):
        """The value of a sample, e.g. `onerec_batch_size_sum`; 0 where there is none."""
        headers = {"authorization": f"Bearer {self.token}"} if self.token else {}
        for line in self.get("/metrics", headers=headers).text.splitlines():
            if line.startswith(name + " "):
                return float(line.split()[-1])
        return 0.0

    def wait_until(self, condition, seconds=30):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.005)
