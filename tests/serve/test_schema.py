"""The live server against its own OpenAPI description: generated requests, right and wrong."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import checks
from schemathesis.generation import GenerationMode

from serve.serve_testing import Service

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def service(deploy, tiny_model) -> Service:
    return deploy("schema", **tiny_model | {"served_model_name": "tiny"}, max_model_len=48, max_num_seqs=128)


@pytest.fixture(scope="module")
def described(service: Service) -> Any:
    return schemathesis.openapi.from_url(f"{service.url}/openapi.json", wait_for_schema=5)


ENDPOINTS = [
    *[("POST", path) for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize")],
    *[("GET", path) for path in ("/v1/models", "/v1/models/{model}", "/tokenizer_info", "/version", "/metrics", "/")],
    *[("GET", "/health"), ("GET", "/ping"), ("POST", "/ping")],
]


@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize(("method", "path"), ENDPOINTS)
def test_answers_are_as_described(service: Service, described: Any, method: str, path: str, mode: GenerationMode):
    """No 5xx, nothing outside the schema, nothing wrong accepted."""
    operation = described[path][method]
    if mode is GenerationMode.NEGATIVE and not operation.body:
        pytest.skip("nothing can be wrong")

    @settings(max_examples=30 if method == "POST" else 5, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        if mode is GenerationMode.POSITIVE and operation.body and (case.body.get("n") or 0) > 3:
            case.body["n"] = 3  # more choices are more of the same, and slow
        response = case.call(base_url=service.url)
        # rules between fields (min_tokens ≤ max_tokens, say) refuse what each field's schema allows
        case.validate_response(response, excluded_checks=[checks.positive_data_acceptance])

    check()


def test_every_endpoint_is_described(described: Any):
    found = {(operation.ok().method.upper(), operation.ok().path) for operation in described.get_all_operations()}
    assert found == set(ENDPOINTS)
