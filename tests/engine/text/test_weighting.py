from __future__ import annotations

import logging

import pytest
from flux_kit.engine.errors import BadInput
from flux_kit.engine.text.weighting import MAX_NESTING, MAX_PROMPT_CHARS, parse_weights
from hypothesis import given
from hypothesis import strategies as st

# Worked out by hand from the rules in the module's docstring.
CASES: list[tuple[str, list[tuple[str, float]]]] = [
    ("", []),
    ("a cat", [("a cat", 1.0)]),
    ("(cat)", [("cat", 1.1)]),
    ("((cat))", [("cat", 1.1 * 1.1)]),
    ("a (red:1.3) cat", [("a ", 1.0), ("red", 1.3), (" cat", 1.0)]),
    ("(a (red:1.5) cat:0.8)", [("a ", 0.8), ("red", 1.5), (" cat", 0.8)]),
    ("((a):1.5)", [("a", 1.5 * 1.1)]),
    ("((a:1.5))", [("a", 1.5)]),
    ("(cat:0)", [("cat", 0.0)]),
    ("(cat:-1)", [("cat", -1.0)]),
    ("(a:b:1.2)", [("a:b", 1.2)]),
    ("(a:b)", [("a:b", 1.1)]),
    ("(12:30)", [("12", 30.0)]),
    ("(:1.2)", [(":1.2", 1.1)]),
    ("()", []),
    ("( )", [(" ", 1.1)]),
    ("(a)(b)", [("a", 1.1), ("b", 1.1)]),
    ("(a", [("(a", 1.0)]),
    ("a)", [("a)", 1.0)]),
    ("x (a", [("x ", 1.0), ("(a", 1.0)]),
    ("((a)", [("(a", 1.1)]),
    (")(a)", [(")(a)", 1.0)]),
    ("(a) b)", [("a", 1.1), (" b)", 1.0)]),
    (r"\(a\)", [("(a)", 1.0)]),
    (r"(\(a\):1.2)", [("(a)", 1.2)]),
    (r"(a\)", [("(a)", 1.0)]),
    (r"\\(a\\)", [(r"\(a\)", 1.0)]),
    (r"\n", [(r"\n", 1.0)]),
]


@pytest.mark.parametrize(("prompt", "expected"), CASES, ids=[case[0] or "empty" for case in CASES])
def test_rules(prompt: str, expected: list[tuple[str, float]]) -> None:
    assert parse_weights(prompt) == expected


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_escaped_text_is_text(text: str) -> None:
    """Escaping every bracket of any text gives the text back as one segment of weight 1."""
    escaped = text.replace("(", r"\(").replace(")", r"\)")
    assert parse_weights(escaped) == ([(text, 1.0)] if text else [])


@given(
    st.lists(st.sampled_from(["(", ")", "\\", ":", "1.2", "a", " ", ":0.5)", "((", "\n"]), max_size=40).map("".join)
)
def test_any_brackets(text: str) -> None:
    """Whatever the brackets: no other error, nothing invented, and what is left stands in the order it was written."""
    rest = iter(text)
    for segment, weight in parse_weights(text):
        assert segment and weight == weight
        assert all(char in rest for char in segment)


@given(st.integers(0, 30), st.floats(-10, 10))
def test_nesting(depth: int, weight: float) -> None:
    assert parse_weights("(" * depth + "a" + ")" * depth) == [("a", pytest.approx(1.1**depth))]
    assert parse_weights("(" * depth + f"(a:{weight!r})" + ")" * depth) == [("a", weight)]


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ("(a:nan)", "nan"),
        ("(a:inf)", "inf"),
        ("(a:-1e999)", "-1e999"),
        ("a\ud800b", "U+D800"),
        ("x\udc28", "U+DC28"),
        ("a" * (MAX_PROMPT_CHARS + 1), str(MAX_PROMPT_CHARS)),
        ("(" * (MAX_NESTING + 2) + "a" + ")" * (MAX_NESTING + 2), str(MAX_NESTING)),
    ],
)
def test_refused(prompt: str, named: str) -> None:
    with pytest.raises(BadInput, match="prompt") as error:
        parse_weights(prompt)
    assert named in str(error.value)


def test_not_text() -> None:
    with pytest.raises(BadInput, match="NoneType"):
        parse_weights(None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prompt", "segments", "weight"),
    [
        ("(" * MAX_PROMPT_CHARS, 1, 1.0),
        (")" * MAX_PROMPT_CHARS, 1, 1.0),
        ("()" * (MAX_PROMPT_CHARS // 2), 0, 1.0),
        ("(" * MAX_NESTING + "a " * 40_000 + ")" * MAX_NESTING, 1, 1.1**MAX_NESTING),
    ],
    ids=["open", "close", "pairs", "deep"],
)
def test_longest_prompts(prompt: str, segments: int, weight: float) -> None:
    """The work must not grow with the square of the length: at 100,000 characters this would never end."""
    parsed = parse_weights(prompt)
    assert len(parsed) == segments and all(found == pytest.approx(weight) for _, found in parsed)


def test_textual_inversion_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert parse_weights("a embedding:style cat") == [("a embedding:style cat", 1.0)]
    assert "embedding:style" in caplog.text and "plain text" in caplog.text
    with caplog.at_level(logging.WARNING):
        assert parse_weights("a (embedding:other:1.2) cat")[1] == ("embedding:other", 1.2)
    assert "'embedding:other'" in caplog.text
