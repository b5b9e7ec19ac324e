"""Rows: nobody shares one, they stay dense, and a prefix is only claimed from a row that holds it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from readme_jax.serving.pages import page_names
from readme_jax.serving.rows import Rows

ROWS, BUCKETS, SIZE = 6, (1, 2, 4, 6), 2
PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=6)


@given(st.lists(st.tuples(st.booleans(), PROMPTS, st.integers(0, 5)), max_size=40))
def test_rows_stay_dense_and_prefixes_true(actions):
    rows, owners, contents = Rows(ROWS, BUCKETS), {}, {}
    for owner, (arrive, prompt, which) in enumerate(actions):
        if arrive and rows.free:
            names = page_names(prompt, SIZE)
            row, source, pages = rows.take(owner, names)
            assert row not in owners
            shared = contents.get(source, [])[: pages * SIZE]
            assert shared == prompt[: pages * SIZE] and len(shared) == pages * SIZE
            owners[row], contents[row] = owner, prompt
            rows.index.extend(row, names)
        elif owners:
            row = sorted(owners)[which % len(owners)]
            del owners[row]
            rows.release(row)
        while (move := rows.move()) is not None:
            source, target = move
            assert target not in owners and target < source
            owners[target], contents[target] = owners.pop(source), contents[source]
        assert rows.free == ROWS - len(owners)
        if owners:
            assert max(owners) < rows.bucket(len(owners))


def test_a_finished_prompt_is_taken_over_in_place_and_a_running_one_copied():
    rows = Rows(4, (1, 2, 4))
    names = page_names([1, 2, 3, 4], 2)
    assert rows.take(1, names) == (0, 0, 0)
    rows.index.extend(0, names)
    rows.release(0)
    assert rows.take(2, names) == (0, 0, 2)
    assert rows.take(3, [*page_names([1, 2], 2), b"other"]) == (1, 0, 1)


def test_a_row_that_holds_nothing_is_taken_before_one_that_may_be_asked_for():
    rows = Rows(4, (4,))
    first = rows.take(1, [])
    rows.index.extend(first.row, page_names([1, 2], 2))
    rows.release(first.row)
    assert rows.take(2, page_names([5, 6], 2)).row != first.row
    assert rows.take(3, page_names([1, 2], 2)) == (first.row, first.row, 1)
