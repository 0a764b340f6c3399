"""benchmarks/crowd.py on a tiny model: with deterministic=True texts and log-probabilities are the same alone, in a
crowd and with drafts; and the comparison sees what differs."""

import json
from types import SimpleNamespace

import make_tiny

from benchmarks import crowd


def test_nothing_differs_in_the_deterministic_mode(tmp_path, capsys):
    make_tiny.make(tmp_path / "tiny", make_tiny.TINY, dtype="bfloat16", seed=0)
    crowd.main(["--model", str(tmp_path / "tiny"), "--dtypes", "bfloat16", "--tokens", "3"])
    *lines, last = capsys.readouterr().out.splitlines()
    results = json.loads(last)["results"]
    assert len(lines) == len(results) == 9
    fixed = {name: found for name, found in results.items() if "deterministic" in name}
    assert len(fixed) == 4 and all(found == {"same": 16, "apart": 0.0} for found in fixed.values())


def test_texts_are_compared_up_to_where_they_part():
    def text(*ids_and_logprobs):
        ids = [i for i, _ in ids_and_logprobs]
        return SimpleNamespace(token_ids=ids, logprobs=[{i: SimpleNamespace(logprob=p)} for i, p in ids_and_logprobs])

    one = [text((1, -1.0), (2, -2.0)), text((3, -1.0), (4, -2.0))]
    other = [text((1, -1.0), (2, -2.5)), text((5, -9.0), (4, -7.0))]
    assert crowd.compare(one, one) == (2, 0.0)
    assert crowd.compare(one, other) == (1, 0.5)
