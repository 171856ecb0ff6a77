"""Answers as pieces of HTML. Every text is escaped here, whoever it is from: visitors, their files, names of labels."""

from collections.abc import Sequence
from html import escape

from ..prediction.answers import Prediction
from ..prediction.explanation import DocumentExplanation, Explanation, Scores
from ..prediction.similarity import RankedPassage
from ..tables import counted, one_line

SHOWN_SCORES, SHOWN_PASSAGES, SHOWN_RANKS = 10, 5, 10
LONGEST_PASSAGE, LONGEST_LABEL = 280, 80


def wrapped(content: str) -> str:
    """Return a result as the interface shows it."""
    return f'<div class="fa-app" aria-live="polite">{content}</div>'


def error_message(message: str) -> str:
    """Return a message on why there is no result."""
    return wrapped(f'<p class="fa-error" role="alert">{escape(message)}</p>')


def answer_part(answer: Prediction, seconds: float, noun: str) -> str:
    """Return the answer, what was read in which time, and the probabilities of the labels, the highest first.

    Args:
        answer: to a document or image.
        seconds: that it took.
        noun: of what was read, such as "token".
    """
    if isinstance(answer.label, float):
        first = f"{answer.label:.4g}"
    else:
        labels = answer.label if isinstance(answer.label, list) else [answer.label or ""]
        shown = ", ".join(one_line(label, LONGEST_LABEL) for label in labels) or "none of the labels"
        first = f"{escape(shown)} <span>{answer.score:.3f}</span>"
    facts = f"{counted(answer.num_tokens, noun)} read in {seconds:.1f} s"
    if answer.is_truncated:
        facts += ". The document is longer: its end was not read"
    best = sorted(answer.scores.items(), key=lambda pair: -pair[1])[:SHOWN_SCORES]
    rows = "".join(
        f'<tr><th scope="row">{escape(one_line(label, LONGEST_LABEL))}</th><td><div class="fa-bar">'
        f'<div style="width:{100 * score:.1f}%"></div></div></td><td>{score:.3f}</td></tr>'
        for label, score in best
    )
    table = f'<table class="fa-scores" aria-label="Probabilities">{rows}</table>' if rows else ""
    return f'<p class="fa-answer">{first}</p><p class="fa-facts">{facts}</p>{table}'


def waiting_part(what: str) -> str:
    """Return a line on what is still being computed."""
    return f'<p class="fa-note">{escape(what)}</p>'


def page_part(explanation: Explanation, address: str) -> str:
    """Return the passages that a document's answer rests on, as links to their places in the page, and the page.

    Args:
        explanation: of a document or an image.
        address: of its page.
    """
    scores = explanation.scores[0]
    parts = []
    if isinstance(explanation, DocumentExplanation):
        best = [number for number in scores.order()[:SHOWN_PASSAGES] if scores.values[number] > 0]
        shares = [float(scores.values[number] / scores.values[best[0]]) for number in best]
        items = [
            _item(explanation.text_of(number), f"{scores.values[number]:+.3f}", share, f"{address}#p{number}")
            for number, share in zip(best, shares, strict=True)
        ]
        title = "Passages that the model takes most from"
        if scores.label is not None:
            title = f"Passages that speak most for {escape(one_line(scores.label, LONGEST_LABEL))}"
        parts.append(f"<h3>{title}</h3>")
        none = '<p class="fa-note">None speaks for it: other answers are less likely still.</p>'
        parts.append(f'<ol class="fa-passages">{"".join(items)}</ol>' if items else none)
    parts.append(_deletion_line(scores, explanation))
    parts.append(
        f'<p class="fa-open"><a href="{escape(address)}" target="_blank" rel="noopener">Open this page on its own</a>, '
        "to keep or to print.</p>"
        f'<iframe title="Explanation" src="{escape(address)}" sandbox="allow-scripts allow-popups"></iframe>'
    )
    return "".join(parts)


def _item(text: str, figure: str, share: float, address: str | None) -> str:
    marked = (
        f'<mark style="--share:{100 * max(0.0, min(1.0, share)):.0f}%">{escape(one_line(text, LONGEST_PASSAGE))}</mark>'
    )
    linked = marked if address is None else f'<a href="{escape(address)}" target="_blank" rel="noopener">{marked}</a>'
    return f"<li><span>{figure}</span>{linked if address else f'<q>{marked}</q>'}</li>"


def _deletion_line(scores: Scores, explanation: Explanation) -> str:
    """Return a sentence on the answer without the passages that score highest; nothing where that wasn't measured."""
    deletion, random = scores.deletion, explanation.random
    if deletion is None or len(deletion.shares) < 2:
        return ""
    label = scores.label or next(iter(explanation.probabilities))
    values = deletion.probabilities[label]
    point = min(range(1, len(values)), key=lambda index: abs(deletion.shares[index] - 0.1))
    told = f"With the {100 * deletion.shares[point]:.1f} % that score highest deleted, it is {values[point]:.3f}"
    if random is not None and point < len(random.shares):
        told += f"; with as much deleted at random, {random.probabilities[label][point]:.3f}"
    shown = escape(one_line(label, LONGEST_LABEL))
    return f'<p class="fa-note">{shown} has {values[0]:.3f}. {told}.</p>'


def similarity_part(similarity: float, names: tuple[str, str], tokens: tuple[int, int]) -> str:
    """Return the cosine similarity of two texts."""
    read = "; ".join(
        f"{escape(one_line(name))}: {counted(count, 'token')}" for name, count in zip(names, tokens, strict=True)
    )
    return (
        f'<p class="fa-answer">{similarity:.3f} <span>cosine similarity</span></p><p class="fa-facts">{read}. Equal '
        "texts have 1; those on unrelated matters are near 0, and rarely below it.</p>"
    )


def ranking_part(document: str, ranked: Sequence[RankedPassage], seconds: float) -> str:
    """Return the passages of a document that are most similar to a question."""
    top = ranked[:SHOWN_RANKS]
    highest, lowest = top[0].similarity, ranked[-1].similarity
    spread = max(highest - lowest, 1e-6)
    items = "".join(
        _item(document[one.start : one.stop], f"{one.similarity:.3f}", (one.similarity - lowest) / spread, None)
        for one in top
    )
    return (
        f'<p class="fa-facts">{counted(len(ranked), "passage")} compared in {seconds:.1f} s; the most similar first, '
        f'the least has {lowest:.3f}.</p><ol class="fa-passages">{items}</ol>'
    )
