"""What the tests of LLM ask with."""

from llama import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
