"""
`onerec-hf serve` on a Ray cluster: replicas on several machines, autoscaling, shares of a GPU, and a new model without a lost request.

    pip install "onerec-hf[ray,serve]"
    python examples/serve_with_ray.py --model my-model --replicas 2 --max_replicas 8 --gpus 0.5

Requests and answers are those of `onerec-hf serve`. Run the command again with another `--model` on the same cluster (RAY_ADDRESS): new replicas start
beside the old ones, which end when they have answered. All machines must see the model's folder, or name a Hub repository.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from onerec_hf.serving import RecommendationService, ServedModel, ServingSettings, create_app
from onerec_hf.serving.access import TOKEN_VARIABLE, is_loopback, read_token
from onerec_hf.workflows.artefact import recommender_of

SCOPE = ("type", "method", "path", "query_string", "headers")
# New replicas start before old ones stop, and these have a minute for their last answers.
ROLLING: dict[str, Any] = {"max_surge_percent": 100, "graceful_shutdown_timeout_s": 60, "max_ongoing_requests": 256}


@serve.deployment(**ROLLING)
class Model:
    """A replica: the application of `onerec-hf serve`, which batches what it is sent."""

    async def __init__(self, repo: str, needs_token: bool = False):
        token = read_token(None, None)
        if needs_token and token is None:
            raise RuntimeError(f"{TOKEN_VARIABLE} is not set where `ray start` ran on {socket.gethostname()}")
        model: Any = await asyncio.to_thread(ServedModel.load, repo, load_recommender=recommender_of)
        self.service = RecommendationService(model, ServingSettings(), load=lambda version: None)
        self.app = create_app(self.service, token)
        await self.service.__aenter__()

    def check_health(self) -> None:
        if not self.service.batcher.alive:
            raise RuntimeError("the computation has stopped")  # Ray replaces the replica

    async def answer(self, scope: dict[str, Any], body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of a request's answer."""
        requests, sent = [{"type": "http.request", "body": body}], []

        async def receive() -> Any:
            return requests.pop() if requests else await asyncio.Future()  # Ray cancels this where the client goes

        async def send(message: Any) -> None:
            sent.append(message)

        await self.app(scope, receive, send)
        headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        return sent[0]["status"], headers, b"".join(each.get("body", b"") for each in sent[1:])


@serve.deployment(**ROLLING, ray_actor_options={"num_cpus": 0.1})
class Front:
    """Passes requests on, again to another replica where one dies: an answer has no side effects."""

    def __init__(self, model: Any):
        self.model = model

    async def __call__(self, request: Request) -> Response:
        if request.url.path == "/reload":
            return JSONResponse({"detail": "run serve_with_ray.py again, with the new model"}, 403)
        scope, body = {key: request.scope[key] for key in SCOPE}, bytearray()
        async for part in request.stream():
            body += part
            if len(body) > ServingSettings().max_body_bytes:
                break  # the application refuses it
        for attempt in range(5):
            try:
                status, headers, content = await self.model.answer.remote(scope, bytes(body))
                return Response(content, status, headers)
            except RayActorError:
                await asyncio.sleep(0.2 * attempt)
        return JSONResponse({"detail": "no replica answers; try again later"}, 503, {"retry-after": "1"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a saved model: folder or Hub id")
    parser.add_argument("--replicas", type=int, default=1, help="least number of replicas, each with the whole model")
    parser.add_argument("--max_replicas", type=int, help="most replicas; in between, the load decides")
    parser.add_argument("--ongoing", type=int, default=16, help="requests in flight per replica that it scales for")
    parser.add_argument("--cpus", type=float, default=1, help="CPUs of a replica")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs of a replica; with 0.5 two replicas share one")
    parser.add_argument("--host", default="127.0.0.1", help=f"address of the proxies; others need {TOKEN_VARIABLE}")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    if not is_loopback(args.host) and TOKEN_VARIABLE not in os.environ:
        parser.error(f"--host {args.host}: set {TOKEN_VARIABLE} here and where `ray start` runs")
    ray.init(ignore_reinit_error=True)
    serve.start(http_options={"host": args.host, "port": args.port})
    limits = {"min_replicas": args.replicas, "max_replicas": max(args.replicas, args.max_replicas or 1)}
    model = Model.options(
        autoscaling_config={**limits, "target_ongoing_requests": args.ongoing},
        ray_actor_options={"num_cpus": args.cpus, "num_gpus": args.gpus},
    ).bind(os.path.abspath(args.model) if os.path.isdir(args.model) else args.model, not is_loopback(args.host))
    serve.run(Front.bind(model), name="onerec", blocking="RAY_ADDRESS" not in os.environ)


if __name__ == "__main__":
    main()
