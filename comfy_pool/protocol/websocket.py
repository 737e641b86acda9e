"""Receive ComfyUI's websocket messages in a thread and deliver them on the event loop.

websocket-client blocks, so each connection has a reader thread; `aclose` wakes and joins it. A
connection is never reopened under the same client id: ComfyUI loses the events of a client id that
connects twice. Open a new connection instead.
"""

from __future__ import annotations

import asyncio
import json
import threading
import uuid
from collections.abc import Callable
from typing import Any, Self

import structlog
import websocket

from comfy_pool.protocol.messages import Hello, MalformedMessage, Message, decode
from restoration.errors import EngineUnavailable

_CONNECT_S = 5.0
# Makes previews carry their prompt id. Source: ComfyUI's comfy_api/feature_flags.py.
_FEATURES = json.dumps({"type": "feature_flags", "data": {"supports_preview_metadata": True}})

log = structlog.get_logger(__name__)


class EventSocket:
    """A connection with its own client id. Create it with `open`; end it with `aclose`."""

    def __init__(
        self,
        base_url: str,
        on_message: Callable[[Message], None],
        on_close: Callable[[], None],
        answer_s: float,
    ) -> None:
        self.client_id = uuid.uuid4().hex
        self.closed = False
        # http becomes ws, https becomes wss
        self._url = f"ws{base_url.removeprefix('http')}/ws?clientId={self.client_id}"
        self._on_message = on_message
        self._on_close = on_close
        self._connect_s = min(answer_s, _CONNECT_S)
        self._loop = asyncio.get_running_loop()
        self._greeted: asyncio.Future[None] = self._loop.create_future()
        self._stopping = False
        # Any, since half of its methods are untyped. `_read` decodes UTF-8 itself, which is faster.
        self._socket: Any = websocket.WebSocket(skip_utf8_validation=True)
        self._reader = threading.Thread(target=self._read, name="comfyui-events", daemon=True)

    @classmethod
    async def open(
        cls,
        base_url: str,
        on_message: Callable[[Message], None],
        on_close: Callable[[], None],
        answer_s: float,
    ) -> Self:
        """Connect and wait for ComfyUI's first message, after which no event is missed.

        Both callbacks run on the event loop. Raises EngineUnavailable if the connection fails or
        takes longer than `answer_s` seconds.
        """
        connection = cls(base_url, on_message, on_close, answer_s)
        connection._reader.start()
        try:
            async with asyncio.timeout(answer_s):
                await connection._greeted
        except TimeoutError as error:
            await connection.aclose()
            raise EngineUnavailable("ComfyUI's websocket did not send its first message") from error
        except BaseException:
            await connection.aclose()
            raise
        return connection

    async def aclose(self) -> None:
        """Close the connection and join its thread. Idempotent."""
        self.closed = self._stopping = True
        self._socket.abort()
        await asyncio.to_thread(self._reader.join)

    def _read(self) -> None:
        """Read frames until the connection ends. Runs in the reader thread."""
        reason: Exception | None = None
        try:
            self._socket.connect(self._url, timeout=self._connect_s, http_no_proxy=["*"])
            self._socket.settimeout(None)  # TCP keep-alive detects a vanished peer
            self._socket.send(_FEATURES)
            while not self._stopping:
                kind, data = self._socket.recv_data()
                if kind == websocket.ABNF.OPCODE_CLOSE:
                    break
                text = kind == websocket.ABNF.OPCODE_TEXT
                frame = data.decode(errors="replace") if text else bytes(data)
                self._loop.call_soon_threadsafe(self._deliver, frame)
        except (websocket.WebSocketException, OSError) as error:
            reason = error
        finally:
            self._socket.shutdown()
            self._loop.call_soon_threadsafe(self._ended, reason)

    def _deliver(self, frame: str | bytes) -> None:
        try:
            message = decode(frame)
        except MalformedMessage as error:
            # At most progress is lost: the outcome is also in the history.
            log.warning("event_ignored", error=error.message)
            return
        if isinstance(message, Hello):
            if not self._greeted.done():
                self._greeted.set_result(None)
        elif message is not None:
            self._on_message(message)

    def _ended(self, reason: Exception | None) -> None:
        self.closed = True
        if not self._greeted.done():
            error = EngineUnavailable(
                f"no websocket connection to ComfyUI: {reason or 'it was closed'}"
            )
            error.__cause__ = reason
            self._greeted.set_exception(error)
            return
        if not self._stopping:
            log.warning("websocket_dropped", reason=str(reason or "closed by ComfyUI"))
        self._on_close()
