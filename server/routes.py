"""The HTTP endpoints: thin handlers between the schemas and the engine.

Handlers read their bodies themselves: the framework would answer a bad one with 422 and its own error object. Nothing
of a request is logged here or anywhere below.
"""

from __future__ import annotations

import hashlib
import time
from importlib.metadata import PackageNotFoundError, version

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from server.auth import caller_of
from server.chat import ChatTemplate
from server.config import Settings
from server.delivery import Delivery, EventStream, plain_response
from server.engine.async_engine import AsyncEngine, EngineInfo
from server.engine.request import RequestError
from server.errors import stopped_error
from server.logprobs import Json, Vocabulary
from server.metrics import Metrics
from server.preprocess import Job, Preprocessor, rename_prompt
from server.responses import Answer
from server.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, Model, TokenizeRequest, parse_body


class Api:
    """The handlers, with what they share."""

    def __init__(
        self, engine: AsyncEngine, settings: Settings, model_name: str, metrics: Metrics, template: ChatTemplate
    ) -> None:
        self._engine = engine
        self._model_name = model_name
        self._metrics = metrics
        self._timeout = settings.request_timeout
        self._preprocessor = Preprocessor(engine.info, engine.tokenizer, settings, template)
        self._vocabulary = Vocabulary(engine.tokenizer)
        self._fingerprint = system_fingerprint(engine.info)
        self._created = int(time.time())

    def routes(self) -> list[BaseRoute]:
        """Every endpoint, without the framework's parsing and dependencies, which take longer than ours. A new one
        belongs into ``metrics.ENDPOINTS`` too."""
        return [
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat_completions, methods=["POST"]),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/v1/models/{model:path}", self.model),
            Route("/health", self.health),
            Route("/ready", self.ready),
            Route("/metrics", self.metrics),
            Route("/version", self.version),
        ]

    async def completions(self, request: Request) -> Response:
        body = await self._read(CompletionRequest, request)
        job = await self._preprocessor.completion(body, caller_of(request.scope))
        return await self._answer(job, request, stream=body.stream, include_usage=body.include_usage)

    async def chat_completions(self, request: Request) -> Response:
        body = await self._read(ChatRequest, request)
        job = await self._preprocessor.chat(body, caller_of(request.scope))
        return await self._answer(job, request, stream=body.stream, include_usage=body.include_usage)

    async def tokenize(self, request: Request) -> Response:
        body = await self._read(TokenizeRequest, request)
        tokens = await self._preprocessor.encode(body.prompt)
        max_length = self._engine.info.max_positions
        return JSONResponse({"tokens": tokens, "count": len(tokens), "max_model_len": max_length})

    async def detokenize(self, request: Request) -> Response:
        body = await self._read(DetokenizeRequest, request)
        return JSONResponse({"prompt": self._preprocessor.decode(body.tokens)})

    async def models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model_card()]})

    async def model(self, request: Request) -> Response:
        self._check_model(request.path_params["model"])
        return JSONResponse(self._model_card())

    async def health(self, _: Request) -> Response:
        """The process answers."""
        return JSONResponse({"status": "ok"})

    async def ready(self, _: Request) -> Response:
        """Requests would be served."""
        if self._engine.ready:
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "not ready"}, status_code=503)

    async def metrics(self, _: Request) -> Response:
        return Response(self._metrics.render(), headers={"content-type": CONTENT_TYPE_LATEST})

    async def version(self, _: Request) -> Response:
        return JSONResponse({"version": package_version()})

    async def _read(self, schema: type[Model], request: Request) -> Model:
        """The request's checked body, for a model that is served."""
        try:
            body = parse_body(schema, await request.body())
        except ClientDisconnect:
            raise RequestError("The request ended before its body.", param=None) from None
        self._check_model(getattr(body, "model", None))
        return body

    async def _answer(self, job: Job, request: Request, *, stream: bool, include_usage: bool) -> Response:
        if not self._engine.ready:
            raise stopped_error()
        timer = self._metrics.timer()
        place = caller_of(request.scope).enter(len(job.request.prompts) * job.request.n)
        try:
            deltas = self._engine.submit(job.request)
        except Exception as error:
            place.leave()
            if job.chat and isinstance(error, RequestError):
                raise rename_prompt(error) from None
            raise
        delivery = Delivery(
            engine=self._engine,
            metrics=self._metrics,
            request_id=job.request.request_id,
            deltas=deltas,
            answer=Answer(job, self._vocabulary, self._model_name, self._fingerprint),
            timer=timer,
            place=place,
            timeout=self._timeout,
        )
        if stream:
            return EventStream(delivery, include_usage=include_usage)
        return await plain_response(delivery, request.receive)

    def _check_model(self, model: str | None) -> None:
        if model is not None and model != self._model_name:
            raise RequestError(
                "The model does not exist; GET /v1/models names the one that is served.",
                param="model",
                code="model_not_found",
                status=404,
            )

    def _model_card(self) -> Json:
        info = self._engine.info
        return {
            "id": self._model_name,
            "object": "model",
            "created": self._created,
            "owned_by": "motserve",
            "max_model_len": info.max_positions,
            "mot": {
                "model_type": info.model_type,
                "parameters": info.parameters,
                "vocab_size": info.vocab_size,
                "max_model_len": info.max_positions,
                "group_size": info.group_size,
                "temperature": info.temperature,
                "group_fill": info.group_fill,
                "reference_fingerprint": info.reference_fingerprint,
                "private_temperature": info.default_privacy.temperature,
                "private_skip_below": info.default_privacy.skip_below,
                "device": info.device,
                "dtype": info.dtype,
                "quantized": info.quantized,
                "tokenizer": self._engine.tokenizer is not None,
            },
        }


def system_fingerprint(info: EngineInfo) -> str:
    """The same while answers can be expected to be the same: the model, its crowd and how it is computed."""
    parts = (
        package_version(),
        info.model_type,
        info.parameters,
        info.temperature,
        info.group_fill,
        info.reference_fingerprint,
        info.device,
        info.dtype,
        info.quantized,
    )
    return "fp_" + hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def package_version() -> str:
    """The installed version, or that of a checkout that is not installed."""
    try:
        return version("motserve")
    except PackageNotFoundError:
        return "0+source"
