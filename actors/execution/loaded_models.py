"""Tracks the workflows whose models a worker's engine has loaded.

ComfyUI does not report which models it holds. It keeps those of the last prompt and unloads others
when memory is short, so only the last job's models count as loaded, and none after a restart.
"""

from __future__ import annotations

import io
from functools import partial
from uuid import uuid4

import structlog
from PIL import Image

from restoration.affinity import Affinity
from restoration.engine_port import Engine, EngineRun, Pixels
from restoration.errors import EngineError
from workflows.catalog import Catalog
from workflows.render import render

log = structlog.get_logger(__name__)

_SIDE = 16  # pixels; enough for ImageUpscaleWithModel and similar nodes


class LoadedModels:
    """Keeps `affinity` up to date with the engine's loaded models."""

    def __init__(self, catalog: Catalog, engine: Engine) -> None:
        self.affinity = Affinity()
        self._catalog = catalog
        self._engine = engine
        self._starts = engine.starts

    def forget_if_restarted(self) -> None:
        """Forget the loaded models if the engine has restarted. Call it before each claim."""
        if self._engine.starts != self._starts:
            self._starts = self._engine.starts
            self.affinity.workflows = frozenset()

    def will_run(self, name: str) -> None:
        """Record that the engine's next job runs this workflow.

        The models of a graph that is not in the catalog are unknown, so none count as loaded.
        """
        known = any(workflow.name == name for workflow in self._catalog)
        self.affinity.workflows = self._catalog.sharing_models(name) if known else frozenset()

    async def warm_up(self, name: str) -> None:
        """Run the workflow on a tiny picture, so that its models are loaded for the first job.

        A failure of the engine is only logged. Raises UnknownWorkflow.
        """
        workflow = self._catalog.find(name)
        file = io.BytesIO()
        Image.new("RGB", (_SIDE, _SIDE), "gray").save(file, "PNG")
        prompt = partial(render, workflow, workflow.resolve({}))
        run = EngineRun(uuid4(), file.getvalue(), ".png", prompt, workflow.manifest.output.node)
        try:
            result = await self._engine.run(run, lambda _: None)
        except EngineError as error:
            log.warning("warm_up_failed", workflow=name, code=error.code, reason=error.message)
            return
        if isinstance(result, Pixels):
            await result.discard()
        self.will_run(name)
