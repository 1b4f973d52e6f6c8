"""The route that predicts. The application has it first, as a request is compared with all routes before its own."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute

from hpo.service.access import Column, Reader, Version, bearer
from hpo.service.body import FILE_BODY, received_file
from hpo.service.predictions import Predictor
from hpo.service.schemas import Prediction

router = APIRouter(prefix="/v1/models", tags=["models"])

PREDICT_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["sequences"],
                    "properties": {
                        "sequences": {
                            "type": "array",
                            "items": {"type": "array", "items": {"type": "array", "items": {"type": "number"}}},
                        },
                        "steps": {
                            "type": "array",
                            "items": {"type": "array", "items": {"type": ["number", "string"]}},
                            "description": "where the steps of each sequence are, numbers or times, which rise; needed "
                            "by a model that is told times",
                        },
                    },
                },
                "example": {"sequences": [[[0.1], [0.3], [0.2]]]},
            },
            **FILE_BODY["requestBody"]["content"],
        },
    }
}


class PredictRoute(APIRoute):
    """JSON with a token in its header goes to the predictor at once; everything else is read as any route does."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """What answers a request."""
        thorough = super().get_route_handler()

        async def answer(request: Request) -> Response:
            token = await bearer(request)
            if token is None or not _is_json(request):
                return await thorough(request)
            return await predictor_of(request).answer(request, token)

        return answer


async def predict(
    name: str,
    version: Version,
    request: Request,
    token: Reader,
    label: Column | None = None,
    id: Column | None = None,
    step: Column | None = None,
    group: Column | None = None,
    time: Column | None = None,
    weight: Column | None = None,
) -> Response:
    """Class and probabilities of sequences, each a list of steps with a value for each feature, or of a data file.

    label, id, step, group, time and weight name columns of the file that are not called as in training.
    """
    predictor = predictor_of(request)
    model = await predictor.model(name, version)
    if _is_json(request):
        return await predictor.answer_json(request, model)
    given = {"label": label, "id": id, "step": step, "group": group, "time": time, "weight": weight}
    columns = {role: column for role, column in given.items() if column is not None}
    async with received_file(request) as file:
        return await predictor.answer_file(request, model, file, columns)


router.add_api_route(
    "/{name}/{version}/predict",
    predict,
    methods=["POST"],
    response_model=Prediction,
    openapi_extra=PREDICT_BODY,
    route_class_override=PredictRoute,
)


def predictor_of(request: Request) -> Predictor:
    """The loaded models of the process."""
    found: Predictor = request.app.state.predictor
    return found


def _is_json(request: Request) -> bool:
    return request.headers.get("content-type", "").lower().startswith("application/json")
