"""One websocket to ComfyUI: frames are read by a thread and handed to the event loop.

websocket-client blocks, so each connection has a reader thread; `aclose` wakes it and waits for
its end. A socket is never reopened: ComfyUI forgets a client id that connects twice, and what it
had to tell the old one is lost. Whoever needs events again opens another.
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
# Previews then say which prompt they belong to. Source: comfy_api/feature_flags.py.
_FEATURES = json.dumps({"type": "feature_flags", "data": {"supports_preview_metadata": True}})

log = structlog.get_logger(__name__)


class EventSocket:
    """A connection under a client id of its own; made by `open`, ended by `aclose` or the peer."""

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
        # half of its methods are untyped; the decoder checks UTF-8, and quicker
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
        """Connect and wait for ComfyUI's hello: from then on no event is missed.

        Both callbacks run on the event loop. Raises EngineUnavailable, after `answer_s` at most.
        """
        connection = cls(base_url, on_message, on_close, answer_s)
        connection._reader.start()
        try:
            async with asyncio.timeout(answer_s):
                await connection._greeted
        except TimeoutError as error:
            await connection.aclose()
            raise EngineUnavailable("ComfyUI's websocket said no hello") from error
        except BaseException:
            await connection.aclose()
            raise
        return connection

    async def aclose(self) -> None:
        """Close the connection and wait for its thread; repeatable."""
        self.closed = self._stopping = True
        self._socket.abort()
        await asyncio.to_thread(self._reader.join)

    def _read(self) -> None:
        """The reader thread."""
        reason: Exception | None = None
        try:
            self._socket.connect(self._url, timeout=self._connect_s, http_no_proxy=["*"])
            self._socket.settimeout(None)  # a peer that vanished shows by TCP keep-alive
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
            # Progress may be lost by that, but no outcome: history has it.
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
            error = EngineUnavailable(f"no websocket to ComfyUI: {reason or 'it was closed'}")
            error.__cause__ = reason
            self._greeted.set_exception(error)
            return
        if not self._stopping:
            log.warning("websocket_dropped", reason=str(reason or "closed by it"))
        self._on_close()
