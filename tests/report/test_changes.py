"""Which tokens of two texts differ."""

from hypothesis import given
from hypothesis import strategies as st

from arrow_quant_v2.report.changes import Changes, Piece, changes

texts = st.text(alphabet="ab .,\n\u00e9", max_size=60)


def marked(pieces: tuple[Piece, ...]) -> str:
    return "".join(f"[{one.text}]" if one.changed else one.text for one in pieces)


def test_residues_are_compared_place_by_place() -> None:
    found = changes("E V Q L V E S", "E V K L V A S")
    assert marked(found.original) == "E V [Q ]L V [E ]S"
    assert marked(found.quantized) == "E V [K ]L V [A ]S"
    assert (found.equal, found.total) == (5, 7)


def test_a_word_that_came_in_changes_no_other() -> None:
    found = changes("the sea was calm.", "the wide sea was calm.")
    assert marked(found.original) == "the sea was calm."
    assert marked(found.quantized) == "the [wide ]sea was calm."
    assert (found.equal, found.total) == (5, 6)


def test_an_empty_text_has_nothing_equal() -> None:
    assert changes("", "a b") == Changes(original=(), quantized=(Piece(text="a b", changed=True),), equal=0, total=2)


@given(texts, texts)
def test_pieces_add_up_to_the_texts(one: str, other: str) -> None:
    found = changes(one, other)
    assert "".join(piece.text for piece in found.original) == one
    assert "".join(piece.text for piece in found.quantized) == other
    assert 0 <= found.equal <= found.total


@given(texts)
def test_a_text_does_not_differ_from_itself(text: str) -> None:
    found = changes(text, text)
    assert not any(piece.changed for piece in found.original + found.quantized)
    assert found.equal == found.total
