"""How a text is written is told from its first bytes; what could be two things is named."""

import codecs

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs._text_guess import DELIMITERS, decoded, guess_delimiter, guess_encoding

TEXT = "name;città\nJosé;Forlì\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-16-le", "utf-16-be", "cp1252"])
def test_the_encoding_that_is_guessed_reads_the_text_back(encoding: str) -> None:
    data = TEXT.encode(encoding)

    assert decoded(data, guess_encoding(data).value) == TEXT


def test_a_byte_order_mark_is_believed_and_is_no_part_of_the_text() -> None:
    data = codecs.BOM_UTF8 + b"a,b\n"

    assert guess_encoding(data) == ("utf-8", None)
    assert decoded(data, "utf-8") == "a,b\n"


def test_a_character_cut_in_two_at_the_end_of_the_sample_does_no_harm() -> None:
    assert guess_encoding("name,x\nJosé,é".encode()[:-1]).value == "utf-8"


def test_a_text_that_is_not_utf_8_is_a_doubt() -> None:
    assert "cp1252 is only likely" in str(guess_encoding(TEXT.encode("cp1252")).doubt)
    assert guess_encoding(TEXT.encode()).doubt is None


@pytest.mark.parametrize("delimiter", DELIMITERS)
def test_the_delimiter_is_what_cuts_the_rows_like_the_header(delimiter: str) -> None:
    rows = [["name", "note", "age"], ["Ann", "one, two; three | four", "1"], ["Bob", "", "2"]]
    text = "".join(
        delimiter.join(f'"{value}"' if delimiter in value else value for value in row) + "\n"
        for row in rows
    )

    assert guess_delimiter(text, ",") == (delimiter, None)


@pytest.mark.parametrize("usual", [",", "\t"])
def test_a_text_of_one_column_has_the_usual_delimiter(usual: str) -> None:
    assert guess_delimiter("name\nRed\nBlue\n", usual) == (usual, None)


def test_of_two_delimiters_that_fit_equally_well_the_usual_is_taken_and_the_other_named() -> None:
    text = "a,b;c\n1,2;3\n"

    assert guess_delimiter(text, ",") == (",", "';' could separate the values as well as ','")
    assert guess_delimiter(text, ";").value == ";"
    assert guess_delimiter(text, "\t").value == ","


@given(st.binary(max_size=300))
def test_any_bytes_get_an_encoding_that_reads_them_and_a_delimiter(data: bytes) -> None:
    text = decoded(data, guess_encoding(data).value)

    assert guess_delimiter(text, ",").value in DELIMITERS
