"""Pages are counted exactly, and known by every token up to their end."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from readme_jax.serving.pages import Pages, PrefixIndex, page_names

OWNERS = st.integers(0, 4)


@given(st.integers(1, 12), st.integers(1, 5), st.lists(st.tuples(OWNERS, st.integers(0, 40)), max_size=40))
def test_pages_held_and_free_add_up(total, size, asked):
    pages, held = Pages(total, size), {}
    for owner, tokens in asked:
        if tokens == 0:
            pages.release(owner)
            held.pop(owner, None)
            continue
        wanted = max(-(-tokens // size), held.get(owner, 0))
        fits = sum(held.values()) - held.get(owner, 0) + wanted <= total
        assert pages.reserve(owner, tokens) == fits
        if fits:
            held[owner] = wanted
        assert pages.free == total - sum(held.values())


@given(st.lists(st.integers(0, 1), max_size=12), st.lists(st.integers(0, 1), max_size=12), st.integers(1, 4))
def test_equal_names_mean_equal_tokens_up_to_there(a, b, size):
    for page, (one, other) in enumerate(zip(page_names(a, size), page_names(b, size), strict=False), start=1):
        assert (one == other) == (a[: page * size] == b[: page * size])
    assert len(page_names(a, size)) == len(a) // size
    assert page_names(a, size, page_names(a[: size * 2], size)) == page_names(a, size)


@given(st.lists(st.tuples(st.integers(0, 3), st.lists(st.integers(0, 1), max_size=8)), max_size=20), st.data())
def test_the_longest_prefix_is_found_with_all_its_rows(contents, data):
    index, rows = PrefixIndex(4), {}
    for row, tokens in contents:
        index.fill(row, page_names(tokens, 2))
        rows[row] = tokens[: len(tokens) // 2 * 2]
        if data.draw(st.booleans()):
            index.cut(row, 1)
            rows[row] = rows[row][:2]
    asked = data.draw(st.lists(st.integers(0, 1), max_size=8))

    def shared(tokens):
        pages = 0
        while 2 * (pages + 1) <= min(len(tokens), len(asked)) and tokens[: 2 * pages + 2] == asked[: 2 * pages + 2]:
            pages += 1
        return pages

    most = max(map(shared, rows.values()), default=0)
    pages, found = index.find(page_names(asked, 2))
    assert pages == most
    assert found == ({row for row, tokens in rows.items() if shared(tokens) == most} if most else set())
