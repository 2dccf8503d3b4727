"""The pairs of a cohort on a Dask cluster: its workers write the output folder, or send files back if they lack it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from LDRCore import __version__
from LDRCore.cohort import store
from LDRCore.cohort.pairs import CohortPair
from LDRCore.cohort.pool import Answer
from LDRCore.cohort.settings import CohortSettings
from LDRCore.errors import RegistrationError
from LDRCore.io.files import describe_failure

_CONNECT_S, _WORKERS_S = 10, 60  # to wait for the scheduler, and for its first worker
_AHEAD = 3  # pairs submitted for each thread of the cluster
_PACKAGES = ("torch", "SimpleITK", "numpy", "distributed")
_performers: list[Any] = []  # one a process: it keeps the fixed images


def versions() -> dict[str, str]:
    """Return the versions that client and workers must share."""
    python = ".".join(platform.python_version_tuple()[:2])
    return {"LDRCore": __version__, "Python": python} | {n: importlib.metadata.version(n) for n in _PACKAGES}


def perform(
    pair: CohortPair, settings: CohortSettings, out: str, probe: str, threads: int, expected: dict[str, str]
) -> dict[str, Any]:
    """Register one pair; runs on a worker of the cluster.

    Args:
        pair, settings: what to do.
        out: the output folder as the client names it.
        probe: a file in it. Where it cannot be seen the results go back as bytes.
        threads: to compute with.
        expected: versions of the client.

    Returns:
        row: of the table; files: {name: bytes} where they are sent back.
    """
    _check_versions(versions(), expected)
    if not _performers:
        import torch

        from LDRCore.cohort.perform import Performer

        torch.set_num_threads(threads)
        _performers.append(Performer())
    if Path(probe).is_file():
        earlier = store.finished_row(Path(out), pair, settings)  # by a worker that was lost before it could say so
        return {"row": earlier or _performers[0](pair, settings, Path(out))}
    with tempfile.TemporaryDirectory() as folder:
        row = _performers[0](pair, settings, Path(folder), marked=False)
        if "error" in row:
            return {"row": row}
        return {"row": row, "files": {p.name: p.read_bytes() for p in store.folder_of(Path(folder), pair).iterdir()}}


def _check_versions(found: dict[str, str], expected: dict[str, str]) -> None:
    wrong = next((name for name in expected if found.get(name) != expected[name]), None)
    if wrong is not None:
        raise RegistrationError(
            f"workers must have {wrong} {expected[wrong]} as the client has, got {found.get(wrong, 'none')}"
        )


class Cluster:
    """A connection to a scheduler whose workers have been checked.

    Attributes:
        workers: how many threads they have; each works on one pair.

    Raises:
        RegistrationError: dask is missing, no scheduler answers, it has no workers, or their versions differ.
    """

    def __init__(self, address: str, settings: CohortSettings, out: Path, threads: int) -> None:
        if importlib.util.find_spec("distributed") is None:
            raise RegistrationError("a scheduler needs dask: pip install 'LDRCore[cluster]'")
        self._settings, self._out, self._threads, self._versions = settings, out, threads, versions()
        self._client = _connect(address)
        try:
            self.workers = self._check_workers(address)
        except BaseException:
            self._client.close()
            raise

    def _check_workers(self, address: str) -> int:
        try:
            self._client.wait_for_workers(1, timeout=_WORKERS_S)
            found = self._client.run(versions)
        except TimeoutError:
            raise RegistrationError(
                f"the scheduler must have workers, got none at {address} in {_WORKERS_S} s"
            ) from None
        except Exception as error:  # a worker without this package, or with another Python
            text = str(error).splitlines()
            raise RegistrationError(
                f"workers must have LDRCore {__version__} and the client's Python, got {type(error).__name__}: "
                f"{text[-1] if text else ''}"
            ) from None
        for one in found.values():
            _check_versions(one, self._versions)
        return sum(self._client.nthreads().values())

    def run(self, pairs: Iterable[tuple[int, CohortPair]]) -> Iterator[Answer]:
        """Yield the answer of every pair as it comes. A pair whose worker is lost is run again by another.

        Raises:
            RegistrationError: the connection to the scheduler is lost.
        """
        from distributed import as_completed

        out = self._out.resolve()
        probe = out / store.STAGING / f"seen-{uuid4().hex}"
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        waiting = iter(pairs)
        numbers: dict[Any, tuple[int, CohortPair]] = {}
        try:
            completed = as_completed([], loop=self._client.loop)
            self._submit(waiting, numbers, completed, str(out), str(probe), _AHEAD * self.workers)
            for future in completed:
                number, pair = numbers.pop(future)
                yield Answer(number, self._row_of(future, pair))
                self._submit(waiting, numbers, completed, str(out), str(probe), 1)
        finally:
            for future in numbers:
                with suppress(Exception):
                    future.cancel()
            with suppress(Exception):
                self._client.close()

    def _submit(
        self, waiting: Iterator[Any], numbers: dict[Any, Any], completed: Any, out: str, probe: str, count: int
    ) -> None:
        for _ in range(count):
            following = next(waiting, None)
            if following is None:
                return
            future = self._client.submit(
                perform, following[1], self._settings, out, probe, self._threads, self._versions, pure=False
            )
            numbers[future] = following
            completed.add(future)

    def _row_of(self, future: Any, pair: CohortPair) -> dict[str, Any]:
        if future.status in ("cancelled", "lost"):
            raise RegistrationError("the scheduler must stay until all is done, got a lost connection")
        if future.status == "error":
            error = future.exception()
            if isinstance(error, RegistrationError):
                return {"error": str(error)}
            return {"error": f"the pair must leave its worker alive, got {type(error).__name__} from the scheduler"}
        result = future.result()
        if "files" in result:
            return self._write(pair, result)
        return dict(result["row"])

    def _write(self, pair: CohortPair, result: dict[str, Any]) -> dict[str, Any]:
        """Write files that were sent back."""
        target = store.folder_of(self._out, pair)
        try:
            with store.staging(self._out) as folder:
                for name, data in result["files"].items():
                    (folder / name).write_bytes(data)
                store.flush_all(folder)
                store.publish(folder, target)
        except OSError as error:
            return {"error": str(describe_failure(target, error)), "unwritten": True}
        if store.finished_row(self._out, pair, self._settings) is None:
            return {"error": f"the outputs must arrive whole, got others in {target}", "unwritten": True}
        return dict(result["row"])


def _connect(address: str) -> Any:
    from distributed import Client

    try:
        return Client(address, timeout=_CONNECT_S, set_as_default=False)
    except (OSError, TimeoutError, ValueError) as error:
        lines = str(error).splitlines()
        raise RegistrationError(
            f"a Dask scheduler must answer at {address}, got none ({lines[-1][:160] if lines else 'no answer'})"
        ) from None
