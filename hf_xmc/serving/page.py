"""A page to try a model in a browser, made with Gradio."""

from __future__ import annotations

import csv
import logging
import os
import re
from collections import Counter
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from fastapi import FastAPI
from starlette.routing import Match, Mount
from starlette.types import Scope

from hf_xmc.hub.card import XMCCard
from hf_xmc.serving.answering import BadRequest, Options
from hf_xmc.serving.batching import Overloaded
from hf_xmc.serving.service import Service
from hf_xmc.serving.settings import MAX_TOP_K

COLUMNS = ("text", "predicted_uids", "predicted_labels", "predicted_scores")
SEPARATOR = "; "
FAILED = "the server failed to answer; its log has more."
TEXT = re.compile(r"`texts\.(\d+)`")  # the name of a text in a message for clients of the API
EMPTY = "The labels of the text appear here, with the words and the training texts that speak for them."
WORDS = "Words for the label (red) and against it (violet)"
MIN_WIDTH = 320  # of a column in pixels; narrower pages have one column
TABLE: dict[str, Any] = {"interactive": False, "wrap": True, "buttons": []}
SECONDS_KEPT = 3600  # time after which uploaded and written files are deleted

logger = logging.getLogger(__name__)


def is_available() -> bool:
    """Return whether Gradio is installed."""
    return find_spec("gradio") is not None


def mount(app: FastAPI, service: Service) -> None:
    """Add the page to an application, at ``/``. Call it after the routes of the API are added, which come first.

    A client that asks ``/`` for JSON does not get the page.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # the page calls no other server
    import gradio as gr

    gr.mount_gradio_app(
        app,
        _blocks(service),
        "/",
        theme=_theme(),
        run_history=False,
        footer_links=[],
        show_error=True,
        max_file_size=service.settings.max_body_bytes,
        enable_monitoring=False,
    )
    routes = app.router.routes
    mounted = routes.pop()
    assert isinstance(mounted, Mount)
    routes.append(_Page("/", mounted.app))


class _Page(Mount):
    """Gradio at ``/``, restricted to its own paths: the application answers all others."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        from gradio.routes import INTERNAL_ROUTES

        path = scope["path"].removeprefix(scope.get("root_path", ""))
        first = path.lstrip("/").partition("/")[0]
        if first not in ("", *INTERNAL_ROUTES) or (not first and wants_json(scope)):
            return Match.NONE, {}
        return super().matches(scope)


def wants_json(scope: Scope) -> bool:
    """Return whether the sender of a request accepts JSON and no HTML.

    >>> wants_json({"headers": [(b"accept", b"application/json")]})
    True
    >>> wants_json({"headers": [(b"accept", b"text/html, application/json;q=0.9")]})
    False
    """
    accepted = dict(scope["headers"]).get(b"accept", b"").lower()
    return b"application/json" in accepted and b"text/html" not in accepted


class Actions:
    """The actions of the page's buttons.

    Args:
        service: The model to ask.
    """

    def __init__(self, service: Service) -> None:
        import gradio as gr

        self._service, self._dropdown = service, gr.Dropdown
        self._error = partial(gr.Error, print_exception=False)  # Gradio would print it, texts and all

    async def predict(self, text: str | None, top_k: float, allow: str | None, deny: str | None) -> tuple[Any, ...]:
        """Return the labels of a text as bars, as a table and as rows, a choice of them, and why the first is there."""
        text = text or ""  # a field that nobody has touched is None, and so are those of uids
        if not text.strip():
            raise self._error("write or paste a text first.")
        (labels,) = await self._ask([text], top_k, allow, deny, explain=True)
        if not labels:
            raise self._error("the model knows no word of the text, so it predicts no label.")
        count = Counter(label["text"] for label in labels)
        names = [f"{row['text']} ({row['uid']})" if count[row["text"]] > 1 else row["text"] for row in labels]
        bars = {name: label["score"] for name, label in zip(names, labels, strict=True)}
        shown = bars if self._service.model.calibration is not None else None
        choices = [(name, number) for number, name in enumerate(names)]
        table = [[label["uid"], label["text"], label["score"]] for label in labels]
        return shown, table, labels, self._dropdown(choices=choices, value=0), *self.explain(text, labels, 0)

    def explain(self, text: str, labels: list[dict[str, Any]], number: int | None) -> tuple[Any, Any]:
        """Return the weighted words and the similar training texts of one of the labels."""
        if number is None:
            return None, None
        label = labels[number]
        return weighted_words(text, label["words"]), [
            [round(row["similarity"], 3), row["text"]] for row in label["nearest"]
        ]

    async def predict_file(self, path: str | None, top_k: float, allow: str | None, deny: str | None) -> str:
        """Return the path of a table with the labels of each line of a file."""
        if path is None:
            raise self._error("choose a text file with one text per line first.")
        try:
            texts = Path(path).read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise self._error(f"the file must be text in UTF-8, got another encoding ({error.reason}).") from None
        return write_table(texts, await self._ask(texts, top_k, allow, deny, explain=False))

    async def _ask(
        self, texts: list[str], top_k: float, allow: str | None, deny: str | None, explain: bool
    ) -> list[list[dict[str, Any]]]:
        options = Options(int(top_k), None, _uids(allow), _uids(deny), explain)
        try:
            return await self._service.answer(texts, options)
        except (BadRequest, Overloaded) as error:
            what = "line {}" if len(texts) > 1 else "the text"
            raise self._error(TEXT.sub(lambda at: what.format(int(at[1]) + 1), str(error))) from None
        except Exception:
            logger.exception("the page failed")
            raise self._error(FAILED) from None


def _theme() -> Any:
    import gradio as gr

    fonts = ["system-ui", "sans-serif"]  # from this machine, and for tables and bars too
    theme = gr.themes.Default(primary_hue="blue", font=fonts, font_mono=fonts)
    return theme.set(  # as dark as white text needs
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_hover_dark="*primary_700",
    )


def _blocks(service: Service) -> Any:
    import gradio as gr

    actions, name, num_labels = Actions(service), service.settings.name, service.labels.num_rows
    calibrated = service.model.calibration is not None
    with gr.Blocks(title=f"hf_xmc: {name}", delete_cache=(SECONDS_KEPT, SECONDS_KEPT)) as blocks:
        gr.Markdown(f"# {name}\n{num_labels:,} labels. The API is described at [/docs](docs).")
        with gr.Row():
            with gr.Column(min_width=MIN_WIDTH):
                with gr.Tab("A text"):
                    text = gr.Textbox(label="Text", lines=8, placeholder="Write or paste a text")
                    button = gr.Button("Predict", variant="primary")
                    if (example := _example(service)) is not None:
                        gr.Examples([[example]], [text], label="Example", api_visibility="private")
                with gr.Tab("A file"):
                    given = gr.File(label="Text file with one text per line", file_types=["text"], height=160)
                    start = gr.Button("Predict", variant="primary")
                    written = gr.File(label="Predictions as CSV", interactive=False, height=110)
                with gr.Accordion("Options", open=False):
                    top_k = gr.Slider(1, min(MAX_TOP_K, num_labels), value=5, step=1, label="Number of labels")
                    allow = gr.Textbox(label="Labels to choose from", info="One uid per line; empty for all", lines=2)
                    deny = gr.Textbox(label="Labels to leave out", info="One uid per line", lines=2)
            with gr.Column(min_width=MIN_WIDTH):
                empty = gr.Markdown(EMPTY, container=True)
                with gr.Column(visible=False) as results:
                    bars = gr.Label(label="Probabilities", show_heading=False, visible=calibrated)
                    labels, number = gr.State([]), gr.Dropdown([], label="Why this label?", type="value")
                    words = gr.HighlightedText(label=WORDS, show_legend=False)
                    nearest = gr.Dataframe(
                        headers=["similarity", "text"],
                        label="Similar training texts with this label",
                        column_widths=["34%", "66%"],
                        visible=service.model.memory is not None,
                        **TABLE,
                    )
                    with gr.Accordion("Uids and exact scores", open=not calibrated):
                        table = gr.Dataframe(
                            headers=["uid", "label", "score"], label="Scores", show_label=False, **TABLE
                        )
        outputs = [bars, table, labels, number, words, nearest]
        asked = button.click(
            actions.predict,
            [text, top_k, allow, deny],
            outputs,
            api_name="predict",
            show_progress_on=[empty, bars if calibrated else table],
        )
        asked.success(_show_results, None, [empty, results], api_visibility="private", show_progress="hidden")
        number.input(actions.explain, [text, labels, number], [words, nearest], api_name="explain")
        start.click(actions.predict_file, [given, top_k, allow, deny], written, api_name="predict_file")
    return blocks


def _show_results() -> tuple[Any, Any]:
    """Show the results, and hide what stands in their place before."""
    import gradio as gr

    return gr.update(visible=False), gr.update(visible=True)


def _example(service: Service) -> str | None:
    """Return the example of the model card, if it names one."""
    card = service.model.card
    text = None if card is None or isinstance(card, str) else card.example
    return None if text == XMCCard.example else text


def weighted_words(text: str, words: list[dict[str, Any]]) -> list[tuple[str, float | None]]:
    """Return the text in parts: words with a weight from -1 to 1, and the text between them.

    >>> weighted_words("a boat", [{"start": 2, "end": 6, "weight": 0.5}])
    [('a ', None), ('boat', 1.0)]
    """
    most = max((abs(word["weight"]) for word in words), default=0.0) or 1.0
    parts: list[tuple[str, float | None]] = []
    end = 0
    for word in words:
        if word["start"] > end:
            parts.append((text[end : word["start"]], None))
        parts.append((text[word["start"] : word["end"]], word["weight"] / most))
        end = word["end"]
    return [*parts, (text[end:], None)] if end < len(text) else parts


def write_table(texts: list[str], answers: list[list[dict[str, Any]]]) -> str:
    """Write texts and their labels as CSV, in a new folder; return its path."""
    path = Path(mkdtemp(prefix="hf_xmc-")) / "predictions.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for text, labels in zip(texts, answers, strict=True):
            cells = [SEPARATOR.join(str(label[name]) for label in labels) for name in ("uid", "text", "score")]
            writer.writerow([text, *cells])
    return str(path)


def _uids(lines: str | None) -> tuple[str, ...] | None:
    return tuple(uid for line in (lines or "").splitlines() if (uid := line.strip())) or None
