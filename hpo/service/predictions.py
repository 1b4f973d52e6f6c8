"""Predictions of promoted models: loaded once, many requests a call, released by an alias at once.

What a request says and whether it may is asked of the database for each request anew, for all that have arrived in one
round trip (`Access.admissions`): a token that was revoked and an alias that moved count from the next request on.
Then the requests of one model are computed together. Large ones, which others had better not wait for, are computed
by themselves, in threads of their own.
"""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from functools import cached_property, partial
from http import HTTPStatus
from typing import Any

import numpy as np
from anyio.to_thread import run_sync
from fastapi import Request, Response
from numpy.typing import NDArray
from starlette.requests import ClientDisconnect

from hpo.launcher.cores import usable_cores
from hpo.models.bundle.bundle import Bundle, load
from hpo.models.bundle.predictions import Predictions
from hpo.models.classifier import weights_of
from hpo.models.data.sequences import DataError, Sequences
from hpo.models.machine import one_thread
from hpo.promote.versions import materialise_model
from hpo.service.access import check_role, opened
from hpo.service.backend import MIB, RETRY_S, Backend, Limits
from hpo.service.batches import Batches
from hpo.service.body import Received
from hpo.service.metrics import predicting
from hpo.service.problems import Problem
from hpo.service.schemas import Prediction
from hpo.storage.access import Access, Admission, Asked
from hpo.storage.connection import Connection
from hpo.storage.registry import ModelVersion

Key = tuple[str, int, datetime]  # name, version, when it was made

# Models in memory, the last ones that were asked for. By count, as they are alike: an LSTM of 128 units has half a MiB.
IN_MEMORY = 32
TOGETHER = 64  # requests of one call
SMALL = 2**16  # bytes of a request that may share a call, which the event loop's thread parses
ALONE = 2**17  # numbers, padding among them, of a request that does not share its call
WIDER = 2  # a call's longest sequence by its shortest: padding costs time
QUICK = 10**8  # multiplications of a call that the event loop's thread makes: some 2 ms
STEP = 25_000  # of them in the time that a layer's step takes whatever it computes
LARGE_WAITING = 16  # large requests
PATIENCE_S = 0.05  # after which a request looks whether its client is still there


class TooLarge(Exception):
    """The request takes so long that others had better not wait for it."""


class ServedModel:
    """A loaded version, whose requests are computed together."""

    def __init__(self, name: str, version: int, bundle: Bundle, limits: Limits, threads: ThreadPoolExecutor) -> None:
        self.name, self.version, self._bundle, self._limits = name, version, bundle, limits
        self._components = [(each, weights_of(each.classifier)[0]) for each in bundle.config.components]
        self._batches: Batches[Sequences, Predictions] = Batches(
            self._computed, threads, waiting=limits.waiting, together=TOGETHER, quick=self._quick
        )

    def ask(self, body: bytes) -> asyncio.Future[Predictions]:
        """What the model says to a JSON body, computed with others. Raises TooLarge, Problem and DataError."""
        if len(body) > SMALL:
            raise TooLarge
        return self._batches.ask(self._sequences(body, ALONE))

    def predict(self, body: bytes) -> Predictions:
        """The same by itself, in the calling thread. Raises Problem and DataError."""
        given = self._sequences(body, self._limits.numbers)
        with predicting(given.n):
            return self._bundle.predict(given)

    def predict_file(self, file: Received, columns: Mapping[str, str]) -> Predictions:
        """What the model says to a data file. Raises Problem and DataError."""
        try:
            given = self._bundle.read(file.path, labeled=False, **columns)
            _check_sizes(self._limits, given.n, given.steps, given.n_features)
            with predicting(given.n):
                return self._bundle.predict(given)
        except DataError as error:
            raise DataError(str(error).replace(str(file.path), file.name)) from None

    def prediction(self, predicted: Predictions) -> Prediction:
        """What goes over the wire."""
        return Prediction(
            model=self.name,
            version=self.version,
            classes=list(predicted.classes),
            ids=list(predicted.ids),
            labels=predicted.labels.tolist(),
            probabilities=predicted.probabilities.tolist(),
        )

    def _sequences(self, body: bytes, most: int) -> Sequences:
        """The sequences of a body. Raises TooLarge where they have more numbers than `most`, Problem and DataError."""
        given, steps = _parsed(body)
        longest = max((len(each) for each in given if isinstance(each, list)), default=0)
        numbers = _check_sizes(self._limits, len(given), longest, len(self._bundle.config.features))
        if numbers > most:
            raise TooLarge
        arrays = [_array(row, sequence) for row, sequence in enumerate(given)]
        return self._bundle.conform(arrays if steps is None else {"X": arrays, "steps": steps})

    def _computed(self, given: Sequence[Sequences]) -> list[Predictions | Exception]:
        """What the model says to each."""
        found: dict[int, Predictions | DataError] = {}
        for places in _alike(given):
            with predicting(sum(given[place].n for place in places)):
                answers = self._bundle.predict_each([given[place] for place in places])
            found.update(zip(places, answers, strict=True))
        return [found[place] for place in range(len(given))]

    def _quick(self, given: Sequence[Sequences]) -> bool:
        """Whether that takes a few milliseconds: a step of a sequence is a multiplication for each weight."""
        rows, steps = sum(each.n for each in given), max(each.steps for each in given)
        work = 0
        for component, weights in self._components:
            layers = component.classifier.layers * (1 + component.classifier.bidirectional)
            work += component.members * (rows * weights + layers * STEP)
        return steps * work <= QUICK


class Predictor:
    """The loaded models of a process, and the way of a request to its prediction."""

    def __init__(self, backend: Backend) -> None:
        cores = usable_cores()
        self._backend, self._limits = backend, backend.limits
        self._computing = ThreadPoolExecutor(cores, "hpo-predict", one_thread)
        self._loads, self._asking = ThreadPoolExecutor(cores, "hpo-load"), ThreadPoolExecutor(1, "hpo-admit")
        self._alone = ThreadPoolExecutor(cores, "hpo-predict-large", one_thread)
        self._models: OrderedDict[Key, ServedModel] = OrderedDict()
        self._loading: dict[Key, asyncio.Task[ServedModel]] = {}
        waiting = self._limits.waiting
        self._admissions: Batches[Asked, Admission] = Batches(
            self._admit, self._asking, waiting=waiting, together=waiting
        )
        self.large: Batches[Callable[[], Predictions], Predictions] = Batches(
            lambda calls: [call() for call in calls],
            self._alone,
            waiting=min(waiting, LARGE_WAITING),
            together=1,
            calls=cores,
        )

    def close(self) -> None:
        """End the threads and the connection; what is being computed goes on to its end."""
        for threads in (self._computing, self._alone, self._loads, self._asking):
            threads.shutdown(wait=False, cancel_futures=True)
        self._connection.close()

    async def answer(self, request: Request, token: str) -> Response:
        """The answer to a JSON request, once the database has said who asks and for which version.

        Raises Problem, MissingModel, DataError and what loading raises.
        """
        name, wanted = request.path_params["name"], request.path_params["version"]
        admission = await self._admissions.ask(Asked(token, name, wanted))
        request.state.token = opened(admission.token)  # for the log
        check_role(request.state.token, "read")
        if admission.version is None or admission.made_at is None:
            model = await self.model(name, wanted)  # says which there are
        else:
            model = self._kept((name, admission.version, admission.made_at)) or await self.model(
                name, str(admission.version)
            )
        return await self.answer_json(request, model)

    async def answer_json(self, request: Request, model: ServedModel) -> Response:
        """The answer to the body of a JSON request."""
        body = await _body(request, self._limits.json)
        try:
            answer = model.ask(body)
        except TooLarge:
            answer = self.large.ask(partial(model.predict, body))
        return _response(model.prediction(await _while_there(request, answer)))

    async def answer_file(
        self, request: Request, model: ServedModel, file: Received, columns: Mapping[str, str]
    ) -> Response:
        """The answer to a data file, whose columns may be called otherwise than in training."""
        return _response(await self.prediction_of_file(request, model, file, columns))

    async def prediction_of_file(
        self, request: Request, model: ServedModel, file: Received, columns: Mapping[str, str]
    ) -> Prediction:
        """What the model says to a data file. Raises Problem and DataError."""
        answer = self.large.ask(partial(model.predict_file, file, columns))
        return model.prediction(await _while_there(request, answer))

    async def model(self, name: str, wanted: str) -> ServedModel:
        """The model of a number or alias, loaded once however many wait for it. Raises MissingModel."""
        found = await run_sync(self._found, name, wanted)
        key = (found.name, found.version, found.created_at)
        if (model := self._kept(key)) is not None:
            return model
        if key not in self._loading:
            self._loading[key] = asyncio.create_task(self._load(key, found))
            self._loading[key].add_done_callback(lambda _: self._loading.pop(key))
        return await asyncio.shield(self._loading[key])

    async def _load(self, key: Key, found: ModelVersion) -> ServedModel:
        loop = asyncio.get_running_loop()
        bundle = await loop.run_in_executor(self._loads, lambda: load(materialise_model(found)))
        self._models[key] = ServedModel(found.name, found.version, bundle, self._limits, self._computing)
        while len(self._models) > IN_MEMORY:
            self._models.popitem(last=False)  # which ends with its last request
        return self._models[key]

    def _kept(self, key: Key) -> ServedModel | None:
        if key in self._models:
            self._models.move_to_end(key)
        return self._models.get(key)

    def _admit(self, asked: Sequence[Asked]) -> list[Admission]:
        each = list(dict.fromkeys(asked))
        found = dict(zip(each, self._access.admissions(each), strict=True))
        return [found[one] for one in asked]

    def _found(self, name: str, wanted: str) -> ModelVersion:
        with self._backend.database() as database:
            return database.registry.get(name, wanted)

    @cached_property
    def _connection(self) -> Connection:
        """Of its own, so that a prediction waits for no other request's connection."""
        return Connection(self._backend.url, RETRY_S)

    @cached_property
    def _access(self) -> Access:
        return Access(self._connection)


def _response(prediction: Prediction) -> Response:
    return Response(prediction.model_dump_json(), media_type="application/json")


async def _while_there(request: Request, answer: asyncio.Future[Predictions]) -> Predictions:
    """The answer. Raises ClientDisconnect once nobody waits for it, which then is not computed unless that has begun.

    The request's body must have been read.
    """
    await asyncio.wait([answer], timeout=PATIENCE_S)
    if not answer.done():
        gone: asyncio.Future[Any] = asyncio.ensure_future(_gone(request))
        try:
            await asyncio.wait([answer, gone], return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
        if not answer.done():
            answer.cancel()
            raise ClientDisconnect
    return answer.result()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _body(request: Request, most: int) -> bytes:
    """The whole body. Raises Problem (413) where it is larger, at once where its length is announced."""
    announced = request.headers.get("content-length", "")
    blocks, size = [], int(announced) if announced.isdecimal() else 0
    if size <= most:
        size = 0
        async for block in request.stream():
            blocks.append(block)
            size += len(block)
            if size > most:
                break
    if size > most:
        way_out = "send more as a data file (curl -F file=@data.csv) or in several requests"
        reason = f"a JSON body of at most {most / MIB:g} MiB is taken here; {way_out}"
        raise Problem(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, reason)
    return b"".join(blocks)


def _check_sizes(limits: Limits, count: int, longest: int, features: int) -> int:
    """How many numbers these sequences are with their padding. Raises Problem (413) beyond a limit, DataError (422)."""
    if not count:
        raise DataError("there is no sequence to predict")
    numbers, reason = count * longest * features, None
    if count > limits.rows:
        reason = f"at most {limits.rows:,} sequences are predicted at once, got {count:,}"
    elif longest > limits.steps:
        reason = f"a sequence of at most {limits.steps:,} steps is predicted, got one of {longest:,}"
    elif numbers > limits.numbers:
        sizes = f"{count:,} sequences of up to {longest:,} steps of {features:,} values"
        way_out = "send fewer, or those of like length together"
        reason = f"{sizes} are {numbers:,} numbers, more than {limits.numbers:,}: {way_out}"
    if reason:
        raise Problem(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, reason)
    return numbers


def _alike(given: Sequence[Sequences]) -> Iterator[list[int]]:
    """Groups of what is computed together: of like length, as all are padded to the longest; the shortest first."""
    group: list[int] = []
    rows = 0
    for place in sorted(range(len(given)), key=lambda place: given[place].steps):
        each = given[place]
        numbers = (rows + each.n) * each.steps * each.n_features
        if group and (each.steps > WIDER * given[group[0]].steps or numbers > ALONE):
            yield group
            group, rows = [], 0
        group.append(place)
        rows += each.n
    if group:
        yield group


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON; a missing value is null")


_JSON = json.JSONDecoder(parse_constant=_no_number)


def _parsed(body: bytes) -> tuple[list[Any], list[Any] | None]:
    """The sequences of a JSON body, and where their steps are. Raises Problem."""
    try:
        content = _JSON.decode(body.decode())
    except (ValueError, RecursionError) as error:
        raise Problem(HTTPStatus.BAD_REQUEST, f"the body is not valid JSON: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("sequences"), list):
        raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, "the body is an object with a list `sequences`")
    steps = content.get("steps")
    if steps is not None and not (isinstance(steps, list) and all(isinstance(row, list) for row in steps)):
        rule = "`steps` is a list of where the steps of each sequence are, each a list of numbers or times"
        raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, rule)
    return content["sequences"], steps


def _array(row: int, sequence: Any) -> NDArray[np.float64]:
    """Numbers (T, F), NaN for null. Raises DataError."""
    if isinstance(sequence, list):
        try:
            found = np.array(sequence)
            if found.dtype.kind in "fiuO":  # O: with null, which becomes NaN
                return found.astype(np.float64)
        except (TypeError, ValueError, OverflowError):
            pass
    rule = "a list of steps, each a list of a number (or null) for each feature"
    raise DataError(f"sequence {row} must be {rule}")
