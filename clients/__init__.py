"""Clients of a motserve server. They share no code with it: the wire is the contract."""

from clients.client import AsyncClient, AsyncStream, Client, Stream
from clients.errors import (
    APIError,
    AuthenticationError,
    BadRequestError,
    ConnectionFailedError,
    MotserveError,
    NotFoundError,
    PermissionDeniedError,
    ProtocolError,
    RateLimitError,
    RequestTooLargeError,
    ServerError,
    TimedOutError,
    UnavailableError,
)
from clients.types import ChatChunk, ChatCompletion, Completion, Model, Mot, Usage

__all__ = [
    "Client",
    "AsyncClient",
    "Stream",
    "AsyncStream",
    "Completion",
    "ChatCompletion",
    "ChatChunk",
    "Model",
    "Mot",
    "Usage",
    "MotserveError",
    "ConnectionFailedError",
    "TimedOutError",
    "ProtocolError",
    "APIError",
    "AuthenticationError",
    "BadRequestError",
    "NotFoundError",
    "PermissionDeniedError",
    "RateLimitError",
    "RequestTooLargeError",
    "ServerError",
    "UnavailableError",
]
