"""What the ranks have makes up the whole, with nothing twice that is not meant to be."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_infer.parallel import slices
from mini_infer.parallel.slices import Span

sizes = st.integers(1, 9)


def assert_in_a_row(spans: list[Span], total: int) -> None:
    assert [span.total for span in spans] == [total] * len(spans)
    assert spans[0].start == 0 and spans[-1].stop == total
    assert all(before.stop == after.start for before, after in pairwise(spans))


@given(st.integers(1, 500), sizes, st.integers(1, 70))
def test_fair_shares_are_in_a_row_and_differ_by_a_unit_at_most(total: int, size: int, unit: int) -> None:
    spans = [slices.fair(total, rank, size, unit) for rank in range(size)]
    assert_in_a_row(spans, total)
    units = [-(-len(span) // unit) for span in spans]
    assert units == sorted(units, reverse=True) and units[0] - units[-1] <= 1
    assert all(span.start % unit == 0 for span in spans if len(span))


@given(st.integers(1, 2000), sizes)
def test_everybody_has_features(total: int, size: int) -> None:
    spans = [slices.features(total, rank, size) for rank in range(size)]
    assert_in_a_row(spans, total)
    assert total < size or all(len(span) for span in spans)
    if total % 64 == 0 and total // 64 >= size:
        assert all(len(span) % 64 == 0 for span in spans)


@given(st.integers(1, 16), st.integers(1, 8), st.integers(1, 16))
def test_queries_lie_beside_the_keys_that_they_look_at(num_kv_heads: int, group: int, size: int) -> None:
    num_heads = num_kv_heads * group
    if not slices.fits_heads(size, num_heads, num_kv_heads):
        return
    for rank in range(size):
        heads, kv_heads = slices.fair(num_heads, rank, size), slices.kv_heads(num_kv_heads, rank, size)
        assert len(heads) == num_heads // size and len(kv_heads) == max(1, num_kv_heads // size)
        for place, head in enumerate(range(heads.start, heads.stop)):
            assert head // group == kv_heads.start + place // (len(heads) // len(kv_heads))


def test_kv_heads_that_cannot_be_shared_out() -> None:
    with pytest.raises(ValueError, match="6 KV heads cannot be shared out to 4 ranks"):
        slices.kv_heads(6, 0, 4)


@given(st.integers(1, 100), st.integers(1, 9))
def test_stages_are_in_a_row_and_the_last_has_least(total: int, stages: int) -> None:
    spans = [slices.layers(total, stage, stages) for stage in range(stages)]
    assert_in_a_row(spans, total)
    counts = [len(span) for span in spans]
    assert max(counts) - min(counts) <= 1
    assert counts[-1] == min(counts) and (stages == 1 or counts[0] <= max(counts))


@given(st.integers(0, 50), st.integers(0, 50), st.integers(1, 100), st.integers(1, 5))
def test_a_span_in_finer_units(start: int, length: int, total: int, factor: int) -> None:
    span = Span(start, start + length, start + length + total)
    fine = span.times(factor)
    assert fine.of(span.total) == slice(span.start, span.stop)
    assert span.of(fine.total) == slice(fine.start, fine.stop)


@given(st.integers(0, 50), st.integers(1, 50), st.integers(0, 50), st.integers(1, 70))
def test_a_span_in_steps(start: int, length: int, after: int, step: int) -> None:
    """Of things with a place for each few, the last one perhaps for fewer."""
    span = Span(start, start + length, start + length + after)
    cover, places = span.cover(step), span.steps(step)
    touched = [first for first in range(0, span.total, step) if first < span.stop and first + step > span.start]
    assert [place * step for place in range(places.start, places.stop)] == touched
    assert cover == Span(touched[0], min(touched[-1] + step, span.total), span.total)
    part = list(range(cover.start, cover.stop))[span.within(cover).start : span.within(cover).stop]
    assert part == list(range(span.start, span.stop)) and span.within(cover).is_whole == (cover == span)
