"""/openapi.json: valid by the specification's own schema, complete, and true of what the server answers."""

import re

import jsonschema
import pytest

from tests.server.helpers import RUN, real_llm, running


@pytest.fixture(scope="module")
def described(scripted):
    return scripted.server.client.get("/openapi.json").json()


def operations(described):
    return [(path, method, each) for path, methods in described["paths"].items() for method, each in methods.items()]


def schemas_in(value):
    if isinstance(value, dict):
        yield value
    for child in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from schemas_in(child)


def check(schema, value, described):
    jsonschema.validate(value, {**schema, "components": described["components"]}, jsonschema.Draft202012Validator)


def test_it_is_valid(described):
    import schemathesis  # takes a second

    schemathesis.openapi.from_dict(described).validate()
    for schema in schemas_in(described["components"]["schemas"]):
        if "default" in schema and "type" in schema:
            check(schema, schema["default"], described)
        if isinstance(reference := schema.get("$ref"), str):
            assert reference.removeprefix("#/components/schemas/") in described["components"]["schemas"]


def test_every_operation_names_its_path_s_parameters_its_errors_and_its_key(described):
    seen = set()
    for path, method, operation in operations(described):
        named = [(each["name"], each["in"], each["required"]) for each in operation.get("parameters", ())]
        assert named == [(name, "path", True) for name in re.findall(r"{(\w+)}", path)]
        assert operation["operationId"] not in seen
        seen.add(operation["operationId"])
        is_open = path in ("/health", "/ready")
        assert is_open is ("security" not in operation)
        assert is_open or {"401", "500"} <= operation["responses"].keys()
        if method == "post":
            assert {"400", "408", "413", "429", "503"} <= operation["responses"].keys()
            streams = set() if path.endswith("tokenize") else {"text/event-stream"}
            assert operation["responses"]["200"]["content"].keys() == {"application/json"} | streams


def test_a_key_is_asked_for_where_one_is_set():
    with running(real_llm(), api_keys=("secret",)) as server:
        described = server.client.get("/openapi.json", headers={"authorization": "Bearer secret"}).json()
        unauthorized = server.client.get("/v1/models")
    scheme = described["components"]["securitySchemes"]["bearer"]
    assert scheme == {"type": "http", "scheme": "bearer"}
    for path, _, operation in operations(described):
        assert operation.get("security") == (None if path in ("/health", "/ready") else [{"bearer": []}])
    schema = described["paths"]["/v1/models"]["get"]["responses"]["401"]["content"]["application/json"]["schema"]
    check(schema, unauthorized.json(), described)


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/chat/completions", {"messages": []}, 400),
        ("/v1/completions", {"prompt": "x", "model": "other"}, 404),
        (RUN, {"prompt": "x", "temperature": 9}, 400),
        (RUN, {"prompt": "x" * 5000}, 413),
        ("/client/v4/accounts/me/ai/v1/completions", {"prompt": "fail"}, 500),
    ],
)
def test_errors_are_as_described(scripted, described, path, body, status):
    response = scripted.run(body, path=path)
    assert response.status_code == status
    template = path.replace("/me/", "/{account_id}/").replace("/run/tiny", "/run/{model}")
    responses = described["paths"][template]["post"]["responses"]
    check(responses[str(status)]["content"]["application/json"]["schema"], response.json(), described)
