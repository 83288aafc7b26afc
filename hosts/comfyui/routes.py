"""What the row editor of the LoRA stack asks the server: names, and of one file facts and picture. Read-only."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from pathlib import Path
from typing import Any

import server

from ...engine.errors import FluxKitError
from .. import lora_rows as loras
from . import folders

web: Any = server.web  # the aiohttp that the server itself speaks
_SAFE = {"X-Content-Type-Options": "nosniff", "Content-Security-Policy": "default-src 'none'; sandbox",
         "Cache-Control": "no-cache"}


def register() -> None:
    """Adds the routes to the server; where there is none (tests, other programs), nothing."""
    running = getattr(server.PromptServer, "instance", None)
    if running is None:
        return
    for path, answer in (("/flux_kit/loras", names), ("/flux_kit/lora", about), ("/flux_kit/lora/picture", picture)):
        running.routes.get(path)(answer)


async def names(request: Any) -> Any:
    return web.json_response({"files": folders.list_files(loras.KIND)})


async def about(request: Any) -> Any:
    try:
        found = await asyncio.to_thread(lambda: loras.facts(asked(request)))
    except FluxKitError as error:
        return web.json_response({"error": error.message}, status=404)
    return web.json_response(asdict(found))


async def picture(request: Any) -> Any:
    try:
        found = await asyncio.to_thread(lambda: loras.picture(asked(request)))
    except FluxKitError:
        found = None
    if found is None:
        return web.json_response({"error": "this file has no picture"}, status=404)
    kind, data = found
    return web.Response(body=data, content_type=kind, headers=_SAFE)


def asked(request: Any) -> Path:
    """The LoRA file that a request names; only files that are listed can be."""
    return folders.resolve_file(loras.KIND, request.query.get("name", ""))
