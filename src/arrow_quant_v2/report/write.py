"""Report, its figures as JSON, and a model card, into the folder of a quantized model; decides nothing about either.

    OUT/report.html       for people; needs the extra `report`
    OUT/report.json       the same figures
    OUT/README.md         the model card; what the original brought is kept as README.original.md

Each file appears whole or not at all.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arrow_quant_v2.errors import StoreError
from arrow_quant_v2.publish import CARD, CONFIG, PAGE, REPORT, original_name
from arrow_quant_v2.report.as_json import FORMAT, from_json, to_json
from arrow_quant_v2.report.card import card, is_ours
from arrow_quant_v2.report.page import HOW_TO_GET, missing_packages, page
from arrow_quant_v2.report.stored import STORED_CONTENT, stored_findings
from arrow_quant_v2.sources.files import read_json
from arrow_quant_v2.sources.folder import PIPELINE
from arrow_quant_v2.workfolder import METADATA, explained

if TYPE_CHECKING:
    from arrow_quant_v2.validation.findings import Findings

LARGEST_CARD = 2**20  # bytes of an original's card that are looked at


@dataclass(frozen=True, kw_only=True)
class Written:
    """What was written, and what a person should know of it."""

    files: tuple[Path, ...]
    notes: tuple[str, ...]


def write_report(folder: Path, findings: Findings, title: str) -> Written:
    """Write all three files; without the packages of the extra `report` a note stands for the page.

    Raises:
        StoreError: the disk refuses.
        SourceError: the config.json of the model is damaged.
        ValidationError: a sample is no PNG picture or no WAV sound.
    """
    lacking = missing_packages()
    contents = {REPORT: json.dumps(to_json(findings), indent=1, ensure_ascii=False, allow_nan=False) + "\n"}
    if not lacking:
        contents[PAGE] = page({title: findings})
    for name in (CARD, REPORT):
        _keep_what_is_not_ours(folder, name)
    contents[CARD] = _card(folder, findings, title)
    for name, text in contents.items():
        write_whole(folder / name, text)
    note = f"no {PAGE}: it needs {' and '.join(lacking)}; {HOW_TO_GET}, then arrow-quant report"
    return Written(files=tuple(folder / name for name in contents), notes=(note,) if lacking else ())


def known_findings(folder: Path) -> Findings:
    """What an earlier report of this very model measured, else what its files say.

    Raises:
        StoreError: no quantized model lies there, or it, or its report.json, is damaged.
        SourceError: its metadata.json is damaged, or report.json is no JSON.
    """
    stored = stored_findings(folder)
    path = folder / REPORT
    content = read_json(path) if path.is_file() else {}
    if content.get("format") != FORMAT:
        return stored
    found = from_json(content, str(path))
    return found if found.facts.get(STORED_CONTENT) == stored.facts[STORED_CONTENT] else stored


def write_page(path: Path, models: dict[str, Findings], title: str) -> None:
    """One page of several models side by side.

    Raises:
        ConfigurationError: no model is given, or a package is missing.
        StoreError: the disk refuses.
        ValidationError: a sample is no PNG picture or no WAV sound.
    """
    write_whole(path, page(models, title))


def write_whole(path: Path, text: str) -> None:
    """Write a file under a temporary name, then rename it.

    Raises:
        StoreError: the disk refuses.
    """
    temporary = path.with_name(path.name + ".tmp")
    with explained(path):
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def _keep_what_is_not_ours(folder: Path, name: str) -> None:
    """Give way to a file that the original brought: it gets the name that quantize would have given it."""
    path = folder / name
    if not path.is_file() or _is_ours(path):
        return
    with explained(path):
        taken = {Path(other.name) for other in folder.iterdir()}
        path.rename(folder / original_name(Path(name), taken))


def _is_ours(path: Path) -> bool:
    if path.name == REPORT:
        return _json(path).get("format") == FORMAT
    return is_ours(_text_of(path) or "")


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _card(folder: Path, findings: Findings, title: str) -> str:
    component = _json(folder / METADATA).get("component")
    config = _json(folder / (component if isinstance(component, str) else "") / CONFIG)
    base = findings.facts.get("model") or title
    return card(findings, base, _library(folder, config), _text_of(folder / original_name(Path(CARD), ())))


def _library(folder: Path, config: dict[str, Any]) -> str:
    """The library that loads the folder, as hubs call it."""
    if (folder / PIPELINE).is_file() or "_class_name" in config:
        return "diffusers"
    return "transformers" if "architectures" in config or "model_type" in config else "arrow-quant-v2"


def _text_of(path: Path) -> str | None:
    """The beginning of a text file; None where there is none. What is no UTF-8 in it does not matter here."""
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            return file.read(LARGEST_CARD).decode("utf-8", "replace")
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}; make it readable, or remove it") from error
