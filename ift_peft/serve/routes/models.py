"""Models: the bases, tuned models and their checkpoints."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from ift_peft.serve.inference import models
from ift_peft.serve.objects import ErrorBody, Model, ModelDeleted, Page, page_of
from ift_peft.serve.service import Serving

router = APIRouter(tags=["models"])
NOT_FOUND: dict[int | str, dict[str, Any]] = {404: {"model": ErrorBody, "description": "No such model"}}
KEPT: dict[int | str, dict[str, Any]] = {
    **NOT_FOUND,
    400: {"model": ErrorBody, "description": "A job is at work with it"},
    403: {"model": ErrorBody, "description": "A base"},
}


@router.get("/models")
def list_models(service: Serving) -> Page[Model]:
    """Every model that can be asked: bases, tuned models, checkpoints."""
    return page_of(models.every(service.settings, service.store), False)


@router.get("/models/{model:path}", responses=NOT_FOUND)
def retrieve_model(model: str, service: Serving) -> Model:
    return models.as_object(models.find(model, service.settings, service.store), service.settings)


@router.delete("/models/{model:path}", responses=KEPT)
def delete_model(model: str, service: Serving) -> ModelDeleted:
    """Delete a tuned model with its run and checkpoints, or one checkpoint. What it is answering, it answers."""
    named = models.find(model, service.settings, service.store)
    for gone in models.remove(named, service.settings, service.store):
        service.models.forget(gone)
    return ModelDeleted(id=model)
