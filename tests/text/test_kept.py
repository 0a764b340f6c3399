"""A cache bounded by bytes, whatever its values come to cost."""

from hypothesis import given
from hypothesis import strategies as st

from llama.text.kept import Kept


@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 40), st.booleans()), max_size=60))
def test_it_keeps_what_was_used_last_and_fits(uses):
    sizes: dict[str, int] = {}
    kept, order = Kept[str](100, lambda key, value: sizes[key]), []
    for key, size, puts in uses:
        if puts:
            sizes[key] = size
            kept.put(key, key * 2)
        elif key in order:
            sizes[key] = max(size, sizes[key])  # has grown
            assert kept.get(key) == key * 2
        else:
            assert kept.get(key) is None
            continue
        order = [other for other in order if other != key] + [key]
        while len(order) > 1 and sum(sizes[other] for other in order) > 100:
            order.pop(0)
        assert kept.nbytes == sum(sizes[other] for other in order) and len(kept) == len(order)
    assert [key for key in "abcdefgh" if kept.has(key)] == sorted(order)
