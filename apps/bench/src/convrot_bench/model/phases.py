"""Which phase a table is in, said on stderr: a run that is cut off shows where it was."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Phases:
    """One table's. `began`: seconds since the epoch, so that several processes count from the same moment."""

    table: str
    began: float = field(default_factory=time.time)

    def __call__(self, phase: str) -> None:
        """A line with the seconds since the table began."""
        sys.stderr.write(f"{self.table}, {time.time() - self.began:.1f} s: {phase}\n")
        sys.stderr.flush()
