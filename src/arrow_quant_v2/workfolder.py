"""The unfinished output: parts that survive a kill, a lock, and the one rename that makes it a model.

    OUT.partial/run.json         whose work this is; another model or configuration is refused
    OUT.partial/parts/00017.part one finished layer; no *.parquet, so that nobody takes the folder for a model
    OUT.partial/widths.json      the widths that layers have fallen back to, where some have
    OUT.partial/allocation.json  the widths of layers, where they were found out by measuring, and what they lose
    OUT.partial/plans/2/         finished layers of one of several whole plans, until the best one is known
    OUT.partial/tuned/           layers again, on grids that were tuned: all that were, or there is no folder
    OUT.partial/samples/         samples that the model made of itself, and what its outputs felt of any
    OUT.partial/model/           the output, while it is put together
    OUT.partial/old/             what is being replaced, for a moment
    OUT.partial/scratch/         what calibration has no memory for; of no use to a later run

Knows nothing of how layers are made.
"""

from __future__ import annotations

import contextlib
import copy
import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from arrow_quant_v2.errors import ConfigurationError, InterruptedRunError, QuantizationError, StoreError
from arrow_quant_v2.store.writer import fsync

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from io import FileIO
    from types import TracebackType

    from typing_extensions import Self

METADATA = "metadata.json"
RUN, PARTS, MODEL, OLD, SCRATCH = "run.json", "parts", "model", "old", "scratch"
WIDTHS, ALLOCATION, SAMPLES, TUNED, PLANS = "widths.json", "allocation.json", "samples", "tuned", "plans"
TEMPORARY = ".tmp"
UNWRITTEN = {WIDTHS + TEMPORARY, ALLOCATION + TEMPORARY}  # of a run that was killed while it wrote them
OURS = {RUN, PARTS, MODEL, OLD, SCRATCH, WIDTHS, ALLOCATION, SAMPLES, TUNED, PLANS, *UNWRITTEN}


def write_whole(path: Path, text: str) -> None:
    """Put a text into a file; it is there whole, or the one before it is."""
    fresh = path.with_name(path.name + TEMPORARY)
    fresh.write_text(text, encoding="utf-8")
    fsync(fresh)
    fresh.replace(path)


class WorkFolder:
    """Everything that a run writes before its output is whole; only one run at a time may hold it."""

    def __init__(self, out: Path, identity: Mapping[str, object], *, overwrite: bool = False) -> None:
        """Open or resume the work on `out`.

        Raises:
            ConfigurationError: `out` exists, or the unfinished work there belongs to another model or configuration.
            StoreError: the folder cannot be made, or another run holds it.
        """
        self.out = out
        self.folder = partial_of(out)
        self.model, self.scratch = self.folder / MODEL, self.folder / SCRATCH
        self.parts, self._old = self.folder / PARTS, self.folder / OLD
        self.allocation, self.samples = self.folder / ALLOCATION, self.folder / SAMPLES
        self.tuned, self._plans = self.folder / TUNED, self.folder / PLANS
        self._overwrite = overwrite
        with explained(self.folder):
            self._refuse_existing()
            self._refuse_strangers()
            self.parts.mkdir(parents=True, exist_ok=True)
        self._lock = self._locked()
        try:
            shutil.rmtree(self.scratch, ignore_errors=True)  # of a run that was killed
            self._put_back()
            self._claim(json.dumps(identity, indent=2, sort_keys=True).encode() + b"\n")
        except BaseException as error:
            if isinstance(error, StoreError):
                self._tidy(error)
            self.close()
            raise

    def for_plan(self, number: int) -> WorkFolder:
        """The same work, with finished layers of its own, for one of several whole plans; closed with this one."""
        one = copy.copy(self)
        one.parts = self._plans / str(number)
        one.tuned = one.parts / TUNED
        with explained(self._plans):
            one.parts.mkdir(parents=True, exist_ok=True)
        return one

    def follow(self, number: int) -> None:
        """Take the finished layers of this whole plan for those of the work, and forget the others.

        A run that is killed in between does it again.
        """
        with explained(self._plans):
            if (self._plans / str(number)).exists() and not any(self.parts.iterdir()):
                (self._plans / str(number)).replace(self.parts)
            shutil.rmtree(self._plans, ignore_errors=True)

    def part(self, index: int) -> Path:
        """Where the finished layer of this number lies, or will lie."""
        return self.parts / f"{index:05d}.part"

    def last(self, index: int) -> Path:
        """Where the layer of this number lies as it ended: tuned, or as it was finished."""
        tuned = self.tuned / self.part(index).name
        return tuned if tuned.exists() else self.part(index)

    def keep_tuned(self, folder: Path) -> None:
        """Take over a folder of tuned layers, whole."""
        with explained(self.tuned):
            for path in (*folder.iterdir(), folder):
                fsync(path)
            folder.rename(self.tuned)

    def recall(self) -> str | None:
        """What `remember` was given last, by this run or the one that it goes on with."""
        path = self.folder / WIDTHS
        with explained(path):
            return path.read_text(encoding="utf-8") if path.exists() else None

    def remember(self, text: str) -> None:
        """Keep a text for a run that goes on with this work; it is there whole, or the one before it is."""
        path = self.folder / WIDTHS
        with explained(path):
            write_whole(path, text)

    def forget(self, indexes: Iterable[int]) -> None:
        """These layers are not finished any more, and none is tuned."""
        with explained(self.parts):
            if self.tuned.exists():
                self.scratch.mkdir(exist_ok=True)
                gone = self.tuned.rename(self.scratch / TUNED)  # at once: half of them would be taken for all
                shutil.rmtree(gone)
            for index in indexes:
                self.part(index).unlink(missing_ok=True)

    def fresh_model(self) -> Path:
        """An empty folder in which the output is put together."""
        with explained(self.model):
            shutil.rmtree(self.model, ignore_errors=True)
            self.model.mkdir()
        return self.model

    def publish(self) -> None:
        """Make everything durable, give it its name, and forget the parts.

        Raises:
            StoreError: the disk refuses; the parts, and a model that was to be replaced, are still there.
        """
        with explained(self.out):
            make_durable_tree(self.model)
            self._make_way()
            try:
                self.model.rename(self.out)
            except OSError:
                self._put_back()
                raise
            fsync(self.out.parent)
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Let another run have the folder."""
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        kept = error is not None and self._tidy(error)
        self.close()
        if kept and isinstance(error, StoreError):
            raise StoreError(f"{error}; what is finished lies in {self.folder}, and the same settings go on with it")

    def _tidy(self, error: BaseException) -> bool:
        """Keep what the next run can go on with, unless the same settings can never finish it; True: it is kept."""
        shutil.rmtree(self.model, ignore_errors=True)
        shutil.rmtree(self.scratch, ignore_errors=True)
        worth = self._finished() or self.allocation.exists() or (was_stopped(error) and any(self.samples.glob("*")))
        hopeless = isinstance(error, QuantizationError) or not worth
        kept = not hopeless or self._old.exists()
        if not kept:
            shutil.rmtree(self.folder, ignore_errors=True)
        return kept

    def _finished(self) -> bool:
        """Whether any layer is finished."""
        return any(True for parts in (PARTS, f"{PLANS}/*") for _ in self.folder.glob(f"{parts}/*.part"))

    def _refuse_existing(self) -> None:
        if not os.path.lexists(self.out) or (self.out.is_dir() and not any(self.out.iterdir())):
            return
        if not is_output(self.out):
            raise ConfigurationError(f"{self.out}: exists and is no quantized model; choose another output folder")
        if not self._overwrite:
            raise ConfigurationError(f"{self.out}: is a finished model already; choose another name, or --overwrite it")

    def _refuse_strangers(self) -> None:
        """Refuse a folder that happens to have our name: it will be removed in the end."""
        if not os.path.lexists(self.folder):
            return
        if not self.folder.is_dir() or {path.name for path in self.folder.iterdir()} - OURS:
            raise ConfigurationError(
                f"{self.folder}: is needed for the unfinished output, but is something else;"
                " rename it, or choose another output folder"
            )

    def _put_back(self) -> None:
        """Undo a replacement that was cut short between its two renames."""
        if self._old.exists() and not self.out.exists():
            with explained(self.out):
                self._old.rename(self.out)
            self._refuse_existing()

    def _make_way(self) -> None:
        if self.out.exists() and any(self.out.iterdir()):
            self.out.rename(self._old)
        elif self.out.exists():
            self.out.rmdir()

    def _locked(self) -> FileIO:
        with explained(self.folder), contextlib.ExitStack() as undo:
            lock = undo.enter_context((self.folder / RUN).open("a+b", buffering=0))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = os.path.samestat(os.fstat(lock.fileno()), (self.folder / RUN).stat())
            except (BlockingIOError, FileNotFoundError):
                held = False
            if not held:  # or its holder removed the folder just now
                raise StoreError(f"{self.folder}: another run is working there; wait for it or choose another output")
            undo.pop_all()
            return lock

    def _claim(self, identity: bytes) -> None:
        self._lock.seek(0)
        found = self._lock.read()
        if found == identity:
            return
        if self._finished():
            raise ConfigurationError(
                f"{self.folder}: holds unfinished work on {difference(found, identity)};"
                f" finish that with the same settings, remove the folder, or choose another output"
            )
        with explained(self.folder):
            for name in (WIDTHS, ALLOCATION):
                (self.folder / name).unlink(missing_ok=True)  # of other work, and nothing was made by them
            for folder in (self.samples, self._plans):
                shutil.rmtree(folder, ignore_errors=True)
            self._lock.truncate(0)
            while identity:  # the system may take a part, and say why only at the next one
                identity = identity[self._lock.write(identity) :]


def was_stopped(error: BaseException) -> bool:
    """Whether a run ended for no reason of its own: by a person, or by a disk that may have room another time."""
    return isinstance(error, InterruptedRunError | StoreError) or not isinstance(error, Exception)


def partial_of(out: Path) -> Path:
    """The folder beside `out` in which it is made."""
    place = Path(os.path.abspath(out))  # noqa: PTH100 - "." has no name, and links are the user's own
    return place.with_name(place.name + ".partial")


def refuse_overlap(out: Path, root: Path, own: Iterable[Path]) -> None:
    """Refuse an output in which, or in whose unfinished folder, the model itself lies, or that lies in the model.

    `own` are the model's files; a lone weight file has no folder of its own that an output could not lie in.

    Raises:
        ConfigurationError: they overlap.
    """
    home, files = root.resolve(), [path.resolve() for path in own]
    above = {home, *home.parents}.union(*(file.parents for file in files))
    inside = len(files) > 1 and home in out.resolve().parents
    if inside or not above.isdisjoint({out.resolve(), partial_of(out).resolve()}):
        raise ConfigurationError(f"{out}: lies in the model's own folder or around it; choose a folder beside it")


def is_output(folder: Path) -> bool:
    """Whether this program wrote the folder: its metadata.json says so."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((folder / METADATA).read_text(encoding="utf-8"))
        return isinstance(found, dict) and found.get("format") == "arrow_quant"
    return False


def difference(found: bytes, asked: bytes) -> str:
    """What sets the work that was found apart from what is asked, in words."""
    with contextlib.suppress(ValueError):
        old, new = json.loads(found), json.loads(asked)
        if isinstance(old, dict):
            changed = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
            return f"another {' and '.join(changed)}"
    return "something else"


def make_durable_tree(root: Path) -> None:
    """Return once every file below `root`, and its name, is on the disk.

    Raises:
        StoreError: the disk refuses.
    """
    with explained(root):
        for folder, _, files in os.walk(root):
            for path in (*(Path(folder, name) for name in files), Path(folder)):
                fsync(path)


@contextlib.contextmanager
def explained(where: Path) -> Iterator[None]:
    """Turn what the disk says into a StoreError that names the place.

    Raises:
        StoreError: the disk is full, permission is missing, ...
    """
    try:
        yield
    except OSError as problem:
        raise StoreError(
            f"{where}: {problem.strerror or problem}; give it room and permission, and run again"
        ) from problem
