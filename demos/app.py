"""A web page that asks the dense and the pruned model the same question, side by side.

Nothing is fetched from outside: no analytics, no sharing link, no web fonts. Gradio is imported when the page
is built.
"""

from __future__ import annotations

import os
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from vlmprune.core import config
from vlmprune.core.errors import InputError, VlmpruneError
from vlmprune.core.registry import registry
from vlmprune.demos.compare import Comparison, Outcome, chat_prompt, compare
from vlmprune.demos.examples import example_questions
from vlmprune.loading import first_line, open_image

if TYPE_CHECKING:
    import gradio
    from PIL import Image

MAX_BYTES = 10 * 2**20
MAX_PIXELS = 25_000_000
MAX_QUESTION = 500  # characters
MIN_KEEP, MAX_KEEP, DEFAULT_KEEP = 0.01, 1.0, 0.22
MAX_NEW_TOKENS = 32
REPEATS = 3
MAX_WAITING = 16
NO_ANSWER = "(nothing)"
UPLOADS_LIVE = 3600  # seconds until an uploaded file is deleted
COLUMNS = ("", "visual tokens", "mean over layers", "prefill ms", "answer ms", "KV cache kB")

Row = list[Any]
Answer = tuple["Image.Image", str, str, list[Row]]


@dataclass
class Backend:
    """Answers the page's requests, one at a time: applying a policy changes the model."""

    model: Any
    processor: Any
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, image: str | None, question: str, policy: str, keep: float) -> Answer:
        """Overlay, dense answer, pruned answer and the table's rows.

        Args:
            image: path of the uploaded file.
            question: up to ``MAX_QUESTION`` characters.
            policy: a registered name. keep: share of the visual tokens, ``MIN_KEEP`` to ``MAX_KEEP``.

        Raises:
            InputError: anything of this is missing, unknown, damaged or out of range.
        """
        picture = _read(image)
        if len(question or "") > MAX_QUESTION:
            raise InputError(f"The question has {len(question)} characters; at most {MAX_QUESTION} are allowed.")
        if isinstance(keep, bool) or not isinstance(keep, (int, float)) or not MIN_KEEP <= keep <= MAX_KEEP:
            raise InputError(f"keep={keep} is out of range; give a share from {MIN_KEEP} to {MAX_KEEP}.")
        if policy not in registry.available():
            raise InputError(f"Unknown policy {policy!r}.")
        chosen = config.build(policy, {"keep": float(keep)})
        prompt = chat_prompt(self.processor, question or "")
        with self.lock:
            result = compare(
                self.model,
                self.processor,
                picture,
                prompt,
                chosen,
                max_new_tokens=MAX_NEW_TOKENS,
                repeats=REPEATS,
            )
        assert result.dense is not None and result.overlay is not None
        dense, pruned = result.dense.answer or NO_ANSWER, result.pruned.answer or NO_ANSWER
        return result.overlay, dense, pruned, table_rows(result)


def build_app(model: Any, processor: Any, name: str = "model") -> gradio.Blocks:
    """The page for a loaded model.

    Args:
        model, processor: an unpruned vision-language model and its processor.
        name: shown in the title.

    Raises:
        VlmpruneError: gradio is not installed.
    """
    gr = import_gradio()
    backend = Backend(model, processor)

    def ask(image: str | None, question: str, policy: str, keep: float) -> Answer:
        try:
            return backend.answer(image, question, policy, keep)
        except VlmpruneError as error:
            raise gr.Error(str(error), print_exception=False) from error

    policies = registry.available()
    title = f"vlmprune: {name}"
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(UPLOADS_LIVE, UPLOADS_LIVE)) as app:
        gr.Markdown(f"## vlmprune\n`{name}` answers with all visual tokens and with those that a policy keeps.")
        with gr.Row():
            with gr.Column():
                image = gr.Image(label="Image", type="filepath", sources=["upload"], buttons=[], elem_id="image")
                # The file is handed over unopened, so that a damaged one gets our message. (A subclass
                # would make gradio write a stub file beside this one.)
                image.preprocess = _uploaded_path
                question = gr.Textbox(label="Question", max_length=MAX_QUESTION, elem_id="q")
                default = "hiprune" if "hiprune" in policies else policies[0]
                policy = gr.Dropdown(policies, value=default, label="Policy", elem_id="policy")
                keep = gr.Slider(
                    MIN_KEEP,
                    MAX_KEEP,
                    DEFAULT_KEEP,
                    step=0.01,
                    label="Share of visual tokens kept",
                    elem_id="keep",
                )
                go = gr.Button("Compare", variant="primary", elem_id="go")
            with gr.Column():
                overlay = gr.Image(
                    label="Kept tokens",
                    format="png",
                    interactive=False,
                    buttons=["download"],
                    elem_id="overlay",
                )
                with gr.Row():
                    dense = gr.Textbox(label="Dense answer", interactive=False, elem_id="dense")
                    pruned = gr.Textbox(label="Pruned answer", interactive=False, elem_id="pruned")
        table = gr.Dataframe(
            headers=list(COLUMNS), label="Cost of one answer", interactive=False, buttons=[], elem_id="table"
        )
        _add_examples(gr, image, question)
        inputs, outputs = [image, question, policy, keep], [overlay, dense, pruned, table]
        go.click(ask, inputs, outputs, api_name="compare", concurrency_limit=1)
    app.queue(max_size=MAX_WAITING)
    return app


def launch(app: gradio.Blocks, host: str = "127.0.0.1", port: int = 7860) -> str:
    """Serve a page in the background.

    Args:
        app: from :func:`build_app`; its ``block_thread()`` waits, its ``close()`` stops serving.
        host: address to listen on. port: 0 takes the first free one from 7860.

    Returns:
        The page's address.

    Raises:
        InputError: the port cannot be used.
    """
    try:
        _, url, _ = app.launch(
            server_name=host,
            server_port=port or None,
            share=False,
            ssr_mode=False,
            quiet=True,
            prevent_thread_lock=True,
            max_file_size=MAX_BYTES,
            footer_links=[],
            enable_monitoring=False,
        )
    except OSError as error:
        raise InputError(f"Cannot listen on {host}:{port}: {first_line(error)}") from None
    return url


def warm_up(model: Any, processor: Any) -> None:
    """Answer one question, so that the first visitor does not pay for lazy set-up."""
    picture, question = example_questions(1)[0]
    policy = config.build("random", {"keep": DEFAULT_KEEP})
    compare(model, processor, picture, chat_prompt(processor, question), policy, repeats=1)


def table_rows(result: Comparison) -> list[Row]:
    """Rows of the page's table; see ``COLUMNS``."""
    sides: list[tuple[str, Outcome | None]] = [("dense", result.dense), ("pruned", result.pruned)]
    return [
        [
            name,
            side.visual_tokens,
            round(side.mean_visual_tokens, 1),
            round(side.prefill_ms, 1),
            round(side.answer_ms, 1),
            None if side.kv_bytes is None else round(side.kv_bytes / 1000, 1),
        ]
        for name, side in sides
        if side is not None
    ]


def _read(image: str | None) -> Image.Image:
    if not image:
        raise InputError("Please give an image.")
    if Path(image).is_file() and Path(image).stat().st_size > MAX_BYTES:
        raise InputError(f"The image file is larger than {MAX_BYTES // 2**20} MB.")
    return open_image(image, MAX_PIXELS, "The image")


def _uploaded_path(payload: Any) -> str | None:
    return None if payload is None else payload.path


def _add_examples(gr: ModuleType, image: Any, question: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:  # gradio copies the files
        rows = []
        for number, (picture, text) in enumerate(example_questions()):
            path = Path(folder) / f"scene-{number}.png"
            picture.save(path)
            rows.append([str(path), text])
        gr.Examples(rows, [image, question], label="Examples", elem_id="examples")


def import_gradio() -> ModuleType:
    """The module ``gradio``, told to stay at home.

    Raises:
        VlmpruneError: it is not installed.
    """
    # Read by gradio when it is imported: without it, it looks up its own servers at start.
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ImportError:
        raise VlmpruneError("The demo needs gradio: pip install 'vlmprune[demo]'") from None
    return gradio
