"""One prompt, answered by a base and by an adapter on it, side by side."""

from __future__ import annotations

import asyncio
from typing import Any

import anyio.to_thread
from fastapi import APIRouter, Request, Response
from sqlalchemy import select

from ift_peft.report.examples import Text
from ift_peft.serve.errors import ApiError
from ift_peft.serve.pages import actions
from ift_peft.serve.pages.page import Page, hint_of, page
from ift_peft.serve.service import Service, Serving
from ift_peft.serve.store.tables import models

router = APIRouter(route_class=Page, include_in_schema=False)
MOST_TOKENS = 256


@router.get("/playground")
def playground(request: Request, service: Serving, model: str = "") -> Response:
    """The form, with the model that the link to it chose."""
    return _page(request, service, model=model)


@router.post("/playground")
async def answered(request: Request, service: Serving) -> Response:
    """Both answers at once, for browsers without the script, which streams them."""
    async with request.form(max_files=0, max_fields=10) as form:
        model, prompt = str(form.get("model", "")), str(form.get("prompt", ""))
    query = select(models.c.base).where(models.c.name == model)
    found = await anyio.to_thread.run_sync(lambda: service.store.one(query))
    names = {"base": model if found is None else str(found["base"]), "adapter": model}
    told = await asyncio.gather(*(_answer(request, name, prompt) for name in names.values()))
    answers = dict(zip(names, told, strict=True))
    return await anyio.to_thread.run_sync(lambda: _page(request, service, model=model, prompt=prompt, answers=answers))


async def _answer(request: Request, model: str, prompt: str) -> dict[str, Any]:
    try:
        told = await actions.chat(request, model, prompt, max_completion_tokens=MOST_TOKENS)
        return {"text": Text(told), "fault": None}
    except ApiError as fault:
        if fault.status == 401:
            raise
        return {"text": None, "fault": f"{fault.message} {hint_of(fault.status)}"}


def _page(
    request: Request,
    service: Service,
    *,
    model: str = "",
    prompt: str = "",
    answers: dict[str, Any] | None = None,
) -> Response:
    tuned = service.store.every(
        select(models.c.name, models.c.base).order_by(models.c.step.is_not(None), models.c.number.desc())
    )
    chosen = next((one for one in tuned if one["name"] == model), tuned[0] if tuned else None)
    return page(
        request,
        "playground.html.j2",
        tuned=tuned,
        chosen=chosen,
        prompt=prompt,
        answers=answers or {},
        most_tokens=MOST_TOKENS,
    )
