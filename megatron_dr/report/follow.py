"""A run's metrics as they grow."""

from pathlib import Path

from megatron_dr.report import metrics, run_log
from megatron_dr.report.run_log import Line, RunLog


class Follower:
    """Reads what was added since the last time.

    Attributes:
        run: as far as it was read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._begin()

    def _begin(self) -> None:
        self.run = RunLog(run_log.name_of(self._path), self._path)
        self._at, self._rest = 0, b""

    def read(self) -> list[Line]:
        """Lines that were added and are whole. A file that was written anew is read anew.

        Raises:
            ValueError: it can't be read any more.
        """
        try:
            with self._path.open("rb") as file:
                if file.seek(0, 2) < self._at:
                    self._begin()
                file.seek(self._at)
                added = file.read()
        except OSError as error:
            raise ValueError(f"{self._path}: can't be read ({error.strerror}).") from None
        self._at += len(added)
        *texts, self._rest = (self._rest + added).split(b"\n")
        found = [line for text in texts if (line := metrics.parsed(text))]
        for line in found:
            self.run.add(line)
        return found
