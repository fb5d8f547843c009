"""Runs the application with uvicorn: graceful shutdown and reload on signals."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from .connections import Seldom, capacity, protocol
from .service import FAILED, RecommendationService, Refused

logger = logging.getLogger(__name__)


class DrainingServer(uvicorn.Server):
    """
    uvicorn server with graceful shutdown: after SIGTERM or SIGINT, new requests get 503 while accepted ones are answered; then the server
    exits. A second signal, or `drain_timeout` seconds, ends the wait.
    """

    def __init__(self, config: uvicorn.Config, service: RecommendationService, drain_timeout: float):
        super().__init__(config)
        self.service, self.drain_timeout = service, drain_timeout
        self._draining: asyncio.Task | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Unlike uvicorn, which re-raises the signal at the end: a requested shutdown exits with status 0.
        self._loop.call_soon_threadsafe(self._stop)

    def _stop(self) -> None:
        if self._draining is None:
            logger.info("stopping after %d open requests", self.service.in_flight)
            self._draining = self._loop.create_task(self._drain())
        else:
            self.service.batcher.abort()

    async def _drain(self) -> None:
        if not await self.service.drain(self.drain_timeout):
            logger.warning("some requests were not answered within %g seconds", self.drain_timeout)
        self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """
    Binds a socket to an address; port 0 selects a free port.

    Raises:
        OSError: the address is in use or does not belong to this machine.
    """
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise OSError(
            f"--host {host} --port {port}: {error.strerror}; choose another port, or 0 for a free one"
        ) from error
    return bound


def create_server(app: FastAPI, service: RecommendationService, drain_timeout: float) -> DrainingServer:
    """The server of an application, with limits on its connections; arguments as for [`serve`]."""
    connections, backlog = capacity()
    config = uvicorn.Config(
        app,
        http=protocol(connections, service.settings.timeout),
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="on",
        timeout_graceful_shutdown=5,
        ws="none",
        backlog=backlog,
    )
    return DrainingServer(config, service, drain_timeout)


def serve(app: FastAPI, service: RecommendationService, bound: socket.socket, drain_timeout: float = 30.0) -> None:
    """
    Serves until SIGTERM or SIGINT; SIGHUP reloads the model.

    Args:
        app: from [`create_app`], for the same service.
        bound: socket from [`listen`].
        drain_timeout: seconds to answer open requests during shutdown.
    """
    server = create_server(app, service, drain_timeout)
    for name in ("asyncio", "uvicorn.error", f"{__package__}.connections"):
        logging.getLogger(name).addFilter(Seldom())
    logging.getLogger(f"{__package__}.service").addFilter(Seldom(only=FAILED))

    # What was made so far stays: full collections would walk through the libraries' million objects, for a fifth of a second each.
    gc.collect()
    gc.freeze()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        reloads = set()

        def reload() -> None:
            task = loop.create_task(_reload(service))
            reloads.add(task)
            task.add_done_callback(reloads.discard)

        loop.add_signal_handler(signal.SIGHUP, reload)
        await server.serve([bound])

    asyncio.run(main())


async def _reload(service: RecommendationService) -> None:
    try:
        reloaded, version, _ = await service.reload()
    except Refused:  # already logged
        return
    if not reloaded:
        logger.info("reload: version %s is already served", version)
