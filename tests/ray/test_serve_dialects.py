"""Tests of both dialects, unchanged, through Ray Serve's proxy: two replicas whose engines say what the user says. Left
out is what looks into the engine, and what Serve's proxy does itself: sockets, limits, ports and signals."""

from types import SimpleNamespace

import pytest

from tests.ray.clusters import served
from tests.server.conftest import client  # noqa: F401
from tests.server.test_chat import (  # noqa: F401
    test_nulls_count_as_absent,
    test_other_errors,
)
from tests.server.test_cloudflare import (  # noqa: F401
    test_a_failed_answer_is_an_internal_error,
    test_a_prompt_is_needed,
    test_an_error_inside_a_stream_ends_it,
    test_an_invalid_request_is_never_a_stream,
    test_bodies_that_are_no_json_objects,
    test_choices_that_are_none,
    test_functions_are_ignored_and_that_is_said,
    test_null_is_no_value_of_any_field,
    test_streamed_tool_calls,
    test_the_error_table,
)
from tests.server.test_cloudflare import test_what_is_refused as test_what_cloudflare_refuses  # noqa: F401
from tests.server.test_completions import test_what_is_refused as test_what_completions_refuse  # noqa: F401
from tests.server.test_doors import (  # noqa: F401
    test_a_prompt_and_back,
    test_run_tells_why_it_ended,
    test_the_search_for_models,
    test_without_flags_there_is_neither,
)
from tests.server.test_responses import (  # noqa: F401
    test_an_answer_that_breaks_off,
    test_the_events_of_a_text_in_their_order,
    test_the_items_of_an_answer_are_taken_back_as_they_came,
)
from tests.server.test_responses import test_what_is_refused as test_what_responses_refuse  # noqa: F401
from tests.server.test_robustness import (  # noqa: F401
    test_openapi_names_every_route_and_schema,
    test_the_event_loop_turns_while_many_stream,
)


@pytest.fixture(scope="module")
def scripted():
    with served("scripted_llm") as server:
        yield SimpleNamespace(server=server, run=server.run)
