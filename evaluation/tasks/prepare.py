"""Tasks as files for lmms-eval: a parquet with pictures and the YAML beside it, in a cache folder."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmprune.core.errors import InputError
from vlmprune.evaluation.tasks.definition import Task

_TEXT_COLUMNS = ("doc_id", "image_id", "question", "answer", "family")


def default_cache() -> Path:
    """Folder of the cache: `vlmprune/tasks` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "vlmprune" / "tasks"


def prepare_task(task: Task, docs: Sequence[Mapping[str, Any]], cache: Path | None = None) -> Path:
    """Make the folder that lmms-eval takes as `include_path` for one task.

    The folder's name holds a digest of its content, so other documents get another folder and a finished one
    is used again. It appears atomically, whoever else builds it at the same time.

    Args:
        task: the task. docs: its documents, in order. cache: parent folder, None for :func:`default_cache`.

    Raises:
        InputError: no documents.
        ImportError: pyarrow is not installed (it comes with the extra `eval`).
    """
    if not docs:
        raise InputError(f"Task {task.name!r} has no documents.")
    pictures = _encode_pictures(docs)
    folder = (cache or default_cache()) / f"{task.name}-{_digest(task, docs, pictures)}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{task.name}-"))
    try:
        _write_parquet(partial / f"{task.name}.parquet", docs, pictures)
        shutil.copyfile(task.yaml_path, partial / task.yaml_path.name)
        os.chmod(partial, 0o755)
        os.rename(partial, folder)
    except OSError:
        if not folder.is_dir():  # another process may have finished it first
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _encode_pictures(docs: Sequence[Mapping[str, Any]]) -> dict[str, bytes]:
    """PNG bytes per image id; PNG keeps every pixel, so lmms-eval sees what the native runner sees."""
    pictures: dict[str, bytes] = {}
    for doc in docs:
        if doc["image_id"] not in pictures:
            stream = io.BytesIO()
            doc["image"].save(stream, format="PNG", compress_level=1)
            pictures[doc["image_id"]] = stream.getvalue()
    return pictures


def _digest(task: Task, docs: Sequence[Mapping[str, Any]], pictures: Mapping[str, bytes]) -> str:
    digest = hashlib.blake2b(task.yaml_path.read_bytes(), digest_size=8)
    for doc in docs:
        digest.update(json.dumps([doc[name] for name in _TEXT_COLUMNS]).encode())
    for name, content in pictures.items():
        digest.update(name.encode() + content)
    return digest.hexdigest()


def _write_parquet(path: Path, docs: Sequence[Mapping[str, Any]], pictures: Mapping[str, bytes]) -> None:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ImportError("lmms-eval's task files need pyarrow: pip install 'vlmprune[eval]'") from error
    images = [{"bytes": pictures[doc["image_id"]], "path": f"{doc['image_id']}.png"} for doc in docs]
    columns = {"image": pa.array(images, type=pa.struct([("bytes", pa.binary()), ("path", pa.string())]))}
    columns |= {name: pa.array([doc[name] for doc in docs], type=pa.string()) for name in _TEXT_COLUMNS}
    # `datasets` reads this key and decodes the column to PIL images.
    features = {"image": {"_type": "Image"}}
    features |= {name: {"dtype": "string", "_type": "Value"} for name in _TEXT_COLUMNS}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path)
