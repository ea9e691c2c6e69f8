from hypothesis import given
from hypothesis import strategies as st

from mopd_nemo.analysis.cases import diff

TEXT = st.text(alphabet="ab \n=+1", max_size=40)


@given(TEXT, TEXT)
def test_parts_join_to_the_texts_and_shared_parts_are_shared(left: str, right: str) -> None:
    mine, theirs = diff(left, right)
    assert "".join(text for _, text in mine) == left
    assert "".join(text for _, text in theirs) == right
    assert [t for differs, t in mine if not differs] == [t for differs, t in theirs if not differs]


def test_only_the_changed_words_are_marked() -> None:
    left, right = diff("same\nx = 1\n", "same\nx = 2\nmore\n")
    assert [text for differs, text in left if differs] == ["1"]
    assert [text for differs, text in right if differs] == ["2", "more\n"]
