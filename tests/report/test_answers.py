"""Scores of answers, by hand and beside the package."""

import pytest

from megatron_dr.report import answers
from megatron_dr.report.answers import exact, f1, normalised, parse, rouge_l


def test_what_squad_compares() -> None:
    assert normalised("  The Cat's  hat,\nan  ANSWER. ") == "cats hat answer"
    assert normalised("theatre") == "theatre"  # an article within a word is none


@pytest.mark.parametrize(
    "answer, reference, is_exact, overlap",
    [
        ("The Eiffel Tower!", "eiffel tower", 1, 1),
        ("in Paris, France", "Paris", 0, 2 * 1 / (3 + 1)),
        ("Paris Paris", "Paris, Texas", 0, 2 * 1 / (2 + 2)),  # a word counts once
        ("b a c", "c b", 0, 1),  # in whatever order; "a" is an article
        ("London", "Paris", 0, 0),
        ("", "Paris", 0, 0),
        ("the", "a.", 1, 1),  # neither has a word
        ("Ja, das stimmt", "ja das Stimmt", 1, 1),
    ],
)
def test_exact_match_and_f1(answer: str, reference: str, is_exact: int, overlap: float) -> None:
    assert exact(answer, reference) == exact(reference, answer) == is_exact
    assert f1(answer, reference) == pytest.approx(overlap) == f1(reference, answer)


def test_rouge_l() -> None:
    """Lin's own example: the longest common subsequences have three and two words of four."""
    pytest.importorskip("rouge_score")
    reference = "police killed the gunman"
    assert rouge_l("police kill the gunman", reference) == pytest.approx(3 / 4)
    assert rouge_l("the gunman kill police", reference) == pytest.approx(2 / 4)
    assert rouge_l("gunman", reference) == pytest.approx(2 * 1 * (1 / 4) / (1 + 1 / 4))
    assert rouge_l("", reference) == rouge_l("nothing", reference) == 0
    assert rouge_l("\u044f \u0436\u0438\u0432\u0443", "\u044f \u043f\u043e\u044e") == 0.5


def test_words_are_the_packages_own_where_text_is_ascii() -> None:
    tokenizers = pytest.importorskip("rouge_score.tokenizers")
    text = "It's 3.5%% of_the GUNMAN -- don't,  e.g. (x_1)\tplain"
    own = tokenizers.DefaultTokenizer(use_stemmer=False).tokenize(text)
    assert answers._Words().tokenize(text) == own


def test_names() -> None:
    assert parse("--metrics", " exact, f1,some.module:reward") == (
        "exact", "f1", "some.module:reward"
    )  # fmt: skip


@pytest.mark.parametrize(
    "text, said",
    [
        (" ,", "--metrics is empty: give, with commas, exact, f1, rouge_l, or a reward as"),
        ("exact,bleu", "--metrics bleu: no such metric; give"),
        ("exact:", "--metrics exact:: no such metric"),
        ("f1,exact,f1", "--metrics has f1 twice: name it once."),
    ],
)
def test_no_names(text: str, said: str) -> None:
    with pytest.raises(ValueError) as error:
        parse("--metrics", text)
    assert str(error.value).startswith(said)


def test_a_package_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "find_spec", lambda name: None)
    assert parse("--metrics", "f1") == ("f1",)
    with pytest.raises(ValueError, match="rouge_l needs the package rouge-score: pip install"):
        parse("--metrics", "f1,rouge_l")
