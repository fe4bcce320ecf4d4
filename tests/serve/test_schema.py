"""The API against the schema that it publishes of itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.serve.client import Client

schemathesis = pytest.importorskip("schemathesis", reason="the schema's tests need schemathesis")
hypothesis = pytest.importorskip("hypothesis")
_specified = pytest.importorskip("schemathesis.specs.openapi.checks")

ANSWERS = [
    schemathesis.checks.not_a_server_error,
    _specified.status_code_conformance,
    _specified.content_type_conformance,
    _specified.response_schema_conformance,
    _specified.response_headers_conformance,
]
CHECKS = [*ANSWERS, _specified.negative_data_rejection, _specified.positive_data_acceptance]
OPERATIONS = [
    ("POST", "/v1/generate"),
    ("GET", "/v1/jobs/{job}"),
    ("DELETE", "/v1/jobs/{job}"),
    ("GET", "/v1/jobs/{job}/events"),
    ("GET", "/v1/jobs/{job}/sounds/{number}.{kind}"),
    ("GET", "/healthz"),
    ("GET", "/v1/models"),
    ("GET", "/metrics"),
]


@pytest.fixture(scope="module")
def own(start: Any) -> Iterator[Client]:
    """A server whose queue takes whatever is asked here."""
    with start(queue=10_000, kept=10_000) as client:
        yield client


@pytest.fixture(scope="module")
def schema(own: Client) -> Any:
    return schemathesis.openapi.from_dict(own.get("/openapi.json").json)


def test_all_operations_are_here(schema: Any) -> None:
    found = {(o.ok().method.upper(), o.ok().path) for o in schema.get_all_operations()}
    assert found == set(OPERATIONS)


@pytest.mark.parametrize(("method", "path"), OPERATIONS, ids=lambda part: part.strip("/"))
def test_answers_are_those_of_the_schema(own: Client, schema: Any, method: str, path: str) -> None:
    operation = schema[path][method]
    strategy = operation.as_strategy()

    @hypothesis.settings(
        max_examples=12,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=strategy)
    def run(case: Any) -> None:
        # Which bytes are a video, and which text is a number, no schema says.
        checks = CHECKS if case.media_type in (None, "application/json") else ANSWERS
        answer = case.call_and_validate(base_url=f"http://{own.host}:{own.port}", checks=checks)
        if answer.status_code == 202:  # its sound is not waited for
            own.ask("DELETE", answer.headers["location"][0])

    run()


def test_a_real_job_is_as_the_schema_says(own: Client, schema: Any, clip: bytes) -> None:
    job = own.generate(clip, count=2).json["id"]
    assert own.wait(job)["status"] == "done"
    address = f"http://{own.host}:{own.port}"
    for path, more in (
        ("/v1/jobs/{job}", {}),
        ("/v1/jobs/{job}/events", {}),
        *(
            ("/v1/jobs/{job}/sounds/{number}.{kind}", {"number": 1, "kind": kind})
            for kind in ("wav", "mp4", "mkv", "json")
        ),
    ):
        case = schema[path]["GET"].Case(path_parameters={"job": job, **more})
        answer = case.call(base_url=address)
        assert answer.status_code == 200
        case.validate_response(answer, checks=ANSWERS)
