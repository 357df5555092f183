"""The application: endpoints, error handlers and limits around one engine, which lives as long as it does.

Knows how the parts fit together; each part's job is its own.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from server.auth import KeyGuard, KeyStore
from server.chat import ChatTemplate
from server.config import Settings
from server.engine.async_engine import AsyncEngine
from server.errors import CatchAll, install_error_handlers
from server.limits import BodyLimit
from server.metrics import Metrics, RequestMetrics
from server.routes import Api, package_version


def create_app(
    engine: AsyncEngine, settings: Settings, model_name: str, *, chat_template: ChatTemplate | None = None
) -> FastAPI:
    """The server around ``engine``, which starts and stops with it. Without a template, chats are joined by blank
    lines. Raises ValueError when there are API keys that cannot be read."""
    store = KeyStore(settings.api_keys) if settings.api_keys is not None else None
    metrics = Metrics(engine, model_name)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        try:
            yield
        finally:
            await engine.stop()

    api = Api(engine, settings, model_name, metrics, chat_template or ChatTemplate())
    app = FastAPI(
        title="motserve", version=package_version(), routes=api.routes(), lifespan=lifespan, openapi_url=None,
        redirect_slashes=False,
    )  # fmt: skip
    install_error_handlers(app)
    # The last one added is the outermost: it counts what the others refuse and catch.
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes)
    if store is not None:
        app.add_middleware(KeyGuard, store=store)
    app.add_middleware(CatchAll)
    app.add_middleware(RequestMetrics, metrics=metrics)
    return app
