"""Requests of visitors: what the buttons do, as functions of what was given that yield HTML."""

import time
from collections.abc import Callable, Iterator
from functools import partial, wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

from ..data.readers.tables import DataError
from ..prediction.answers import Prediction
from ..prediction.explaining import explain_document, explain_image
from ..prediction.explanation import Explanation
from ..prediction.explanation_page import render_explanation
from ..prediction.predictor import Predictor
from .gate import PAGES
from .models import Models
from .page_store import PageStore
from .results import answer_part, error_message, page_part, ranking_part, similarity_part, waiting_part, wrapped
from .uploads import Document, check_length, message_of, pick, read_document, read_image

THOROUGH_TOKENS = 2**12
"""Tokens up to which a document is explained for several labels and deletions are measured: visitors wait for one
another."""
TWO_TEXTS, QUESTION = "Two texts", "A question and passages of a text"
Parameters = ParamSpec("Parameters")


def shown(
    function: Callable[Concatenate["Requests", Parameters], Iterator[str]],
) -> Callable[Concatenate["Requests", Parameters], Iterator[str]]:
    """Show a visitor what is wrong with a request in the place of its result, instead of raising it."""

    @wraps(function)
    def call(requests: "Requests", *args: Parameters.args, **kwargs: Parameters.kwargs) -> Iterator[str]:
        paths = [
            Path(value) for value in (*args, *kwargs.values()) if isinstance(value, str) and "\n" not in value[:4096]
        ]
        try:
            yield from function(requests, *args, **kwargs)
        except Exception as error:  # whatever it is, the server goes on
            named = next((path for path in paths if path.is_absolute() and str(path) in str(error)), None)
            yield error_message(message_of(error, named))

    return call


class Requests:
    """Requests of all visitors, who share the models.

    Args:
        models: that answer.
        pages: where explanation pages are kept.
    """

    def __init__(self, models: Models, pages: PageStore):
        self.models, self.pages = models, pages

    @shown
    def document(self, text: str, path: str | None, licence: str | None, passage: str) -> Iterator[str]:
        """Yield the answer to a document, and then with it what the answer rests on.

        Args:
            text: pasted, or "".
            path: of an uploaded file.
            licence: name of a packaged licence text.
            passage: "sentence", or a number of tokens.
        """
        predictor = self.models.text
        assert predictor is not None
        document = pick(
            ("a text", _pasted(text)),
            ("a file", None if not path else lambda: read_document(Path(path))),
            ("a packaged licence", None if not licence else lambda: Document(licence, self.models.licences[licence])),
        )
        started = time.perf_counter()
        answer = answered(predictor, document.text)
        first = answer_part(answer, time.perf_counter() - started, "token")
        yield wrapped(first + waiting_part("Finding the passages that it rests on …"))
        is_long = answer.num_tokens > THOROUGH_TOKENS
        brief: dict[str, Any] = {"deletion_tokens": 0}
        if isinstance(answer.label, str):
            brief["labels"] = [answer.label]
        explanation = explain_document(
            predictor,
            document.text,
            name=document.name,
            passage="sentence" if passage == "sentence" else int(passage),
            page_starts=document.page_starts,
            **(brief if is_long else {"deletion_tokens": 8 * THOROUGH_TOKENS}),
        )
        yield wrapped(first + page_part(explanation, self._keep(explanation)))

    @shown
    def image(self, path: str | None, canvas: str | None) -> Iterator[str]:
        """Yield the answer to an image, and then with it where in the image it rests.

        Args:
            path: of an uploaded file.
            canvas: name of a packaged image.
        """
        predictor = self.models.image
        assert predictor is not None
        if bool(path) == bool(canvas):
            raise DataError("give an image" if not path else "there are a file and a packaged image: clear one")
        name = canvas or Path(path or "").name
        content = self.models.canvases[canvas] if canvas else read_image(Path(path or ""))
        started = time.perf_counter()
        answer = answered(predictor, content)
        first = answer_part(answer, time.perf_counter() - started, "patch")
        yield wrapped(first + waiting_part("Finding the regions that it rests on …"))
        explanation = explain_image(predictor, content, name=name)
        yield wrapped(first + page_part(explanation, self._keep(explanation)))

    @shown
    def compare(
        self, mode: str, text: str, path: str | None, other_text: str, other_path: str | None, passage: str
    ) -> Iterator[str]:
        """Yield how alike two texts are, or which passages of the second are most like the first.

        Args:
            mode: `TWO_TEXTS` or `QUESTION`.
            text, path: the first text or question, pasted or uploaded.
            other_text, other_path: the second text.
            passage: tokens of a passage.
        """
        encoder = self.models.encoder
        assert encoder is not None
        first = pick(
            ("a first text", _pasted(text, "first text")),
            ("a first file", None if not path else partial(read_document, Path(path))),
        )
        second = pick(
            ("a second text", _pasted(other_text, "second text")),
            ("a second file", None if not other_path else partial(read_document, Path(other_path))),
        )
        started = time.perf_counter()
        if mode == TWO_TEXTS:
            similarity, tokens = encoder.similarity(first.text, second.text)
            yield wrapped(similarity_part(similarity, (first.name, second.name), tokens))
        else:
            ranked = encoder.rank(first.text, second.text, int(passage))
            yield wrapped(ranking_part(second.text, ranked, time.perf_counter() - started))

    def _keep(self, explanation: Explanation) -> str:
        """Return the address of an explanation's page, relative to the app's."""
        return f"{PAGES.removeprefix('/')}{self.pages.add(render_explanation(explanation).encode())}"


def answered(predictor: Predictor, item: Any) -> Prediction:
    """Return the answer to one text or image.

    Raises:
        DataError: it can't be used.
    """
    answer = next(predictor.predict([item], on_error="return"))
    if answer.error is not None:
        raise DataError(answer.error)
    return answer


def _pasted(text: str | None, name: str = "pasted text") -> Callable[[], Document] | None:
    return None if not text or not text.strip() else lambda: Document(name, check_length(text))
