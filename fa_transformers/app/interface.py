"""The interface: tabs, fields and buttons by Gradio, and what each button asks for."""

from collections.abc import Callable, Iterator
from typing import Any

import gradio

from .models import Models
from .requests import QUESTION, TWO_TEXTS, Requests
from .uploads import MAX_CHARACTERS, MAX_FILE_BYTES, STORED_SECONDS, SWEEP_SECONDS, TEXT_ENDINGS

TITLE = "fa_transformers"
MAX_WAITING = 32
"""Requests that wait for the model at a time, which takes them one by one; more are turned away."""
PASSAGES = [("sentences", "sentence"), ("64 tokens", "64"), ("256 tokens", "256"), ("1,024 tokens", "1024")]
QUESTION_PASSAGES = [name_and_value for name_and_value in PASSAGES if name_and_value[1] != "sentence"]


def build_interface(models: Models, requests: Requests) -> gradio.Blocks:
    """Return the interface of the models that there are."""
    # Uploads are deleted `STORED_SECONDS` after they came, looked after every `SWEEP_SECONDS`.
    with gradio.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(SWEEP_SECONDS, STORED_SECONDS)) as blocks:
        gradio.Markdown(
            "# What does an answer rest on?\n"
            "Nothing that you give leaves this server. Files are limited to "
            f"{MAX_FILE_BYTES >> 20} MiB, deleted after {STORED_SECONDS // 60} minutes, and seen by nobody else."
        )
        if models.text is not None:
            with gradio.Tab("Document"):
                _document_tab(models, requests)
        if models.image is not None:
            with gradio.Tab("Image"):
                _image_tab(models, requests)
        if models.encoder is not None:
            with gradio.Tab("Compare"):
                _compare_tab(models, requests)
    blocks.queue(max_size=MAX_WAITING, api_open=False, default_concurrency_limit=1)
    return blocks


def _document_tab(models: Models, requests: Requests) -> None:
    gradio.Markdown(models.notes.get("text", ""))
    with gradio.Row():
        with gradio.Column(scale=3):
            text = _text_field("Text", lines=8)
        with gradio.Column(scale=2):
            path = _file_field("or a file: text or PDF", list(TEXT_ENDINGS))
            licence = gradio.Dropdown(
                list(models.licences), value=None, label="or a packaged licence", visible=bool(models.licences)
            )
            passage = gradio.Dropdown(PASSAGES, value="sentence", label="Passages are")
    _keep_last(text, path, licence)
    _button("Explain", requests.document, [text, path, licence, passage])


def _image_tab(models: Models, requests: Requests) -> None:
    gradio.Markdown(models.notes.get("image", ""))
    with gradio.Row():
        path = _file_field("An image", ["image"])
        canvas = gradio.Dropdown(
            list(models.canvases), value=None, label="or a packaged canvas", visible=bool(models.canvases)
        )
    _keep_last(path, canvas)
    _button("Explain", requests.image, [path, canvas])


def _compare_tab(models: Models, requests: Requests) -> None:
    gradio.Markdown(models.notes.get("encoder", ""))
    mode = gradio.Radio([TWO_TEXTS, QUESTION], value=TWO_TEXTS, label="Compare")
    fields: list[Any] = []
    with gradio.Row():
        for name in ("First text, or the question", "Second text"):
            with gradio.Column():
                text = _text_field(name, lines=6)
                path = _file_field("or a file: text or PDF", list(TEXT_ENDINGS))
                _keep_last(text, path)
                fields += [text, path]
    passage = gradio.Dropdown(QUESTION_PASSAGES, value="256", label="Passages are", visible=False)
    mode.change(
        lambda chosen: gradio.update(visible=chosen == QUESTION), mode, passage, api_visibility="private",
        show_progress="hidden",
    )  # fmt: skip
    _button("Compare", requests.compare, [mode, *fields, passage])


def _keep_last(*fields: Any) -> None:
    """Let what is given last clear the other ways to give the same thing, in the browser."""
    for field in fields:
        others = [other for other in fields if other is not field]
        empty = ["''" if isinstance(other, gradio.Textbox) else "null" for other in others]
        # A field that was cleared changes, too, and leaves the others as they are.
        script = f"(given, ...others) => given ? [{', '.join(empty)}] : others"
        event = field.upload if isinstance(field, gradio.File) else field.change
        event(None, [field, *others], others, js=script, queue=False, show_progress="hidden")


def _text_field(label: str, lines: int) -> gradio.Textbox:
    return gradio.Textbox(label=label, lines=lines, max_lines=24, max_length=MAX_CHARACTERS)


def _file_field(label: str, file_types: list[str]) -> gradio.File:
    return gradio.File(
        label=label, file_count="single", file_types=file_types, type="filepath", height=140,
        elem_classes="fa-upload",
    )  # fmt: skip


def _button(name: str, request: Callable[..., Iterator[str]], fields: list[Any]) -> None:
    """Add a button and the place of its result; all of these wait in one queue, as there is one processor to share."""
    button = gradio.Button(name, variant="primary")
    result = gradio.HTML(elem_classes="fa-result")
    button.click(
        request, fields, result, concurrency_id="model", concurrency_limit=1, api_visibility="private",
        show_progress="minimal",
    )  # fmt: skip
