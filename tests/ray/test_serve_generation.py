"""Tests of the server over a real tiny model, unchanged, through Ray Serve's proxy and two replicas."""

import pytest

from tests.ray.clusters import served
from tests.server.conftest import tiny_client  # noqa: F401
from tests.server.test_chat import (  # noqa: F401
    test_a_seed_comes_back_and_repeats,
    test_a_seeded_neighbour_is_not_touched_by_a_grammar,
    test_json_schema,
    test_logprobs,
)
from tests.server.test_chat_tools import test_calls_that_must_be_made  # noqa: F401
from tests.server.test_cloudflare import test_a_call_that_is_asked_for_is_made, test_json_mode  # noqa: F401
from tests.server.test_responses import (  # noqa: F401
    test_a_schema_and_a_choice_of_tools_are_kept,
    test_log_probabilities_of_each_token,
)
from tests.server.test_streams import test_a_seed_that_comes_back_gives_its_completion_again  # noqa: F401
from tests.server.test_structured_outputs import (  # noqa: F401
    test_constraints_that_are_refused,
    test_structured_outputs_and_their_older_names,
)


@pytest.fixture(scope="module")
def tiny():
    with served("real_llm") as server:
        yield server
