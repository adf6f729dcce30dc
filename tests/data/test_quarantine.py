"""A run's own quarantine file, as a continued run reads it."""

import json
from pathlib import Path

from vitssl.data.quarantine import FILE, Decided, Quarantine, count_bad, passing


def test_a_half_written_row_ends_what_is_read(tmp_path: Path) -> None:
    assert passing(tmp_path) == {} and count_bad(tmp_path) == 0
    rows = [
        {"position": 3, "key": "a", "reason": "gone", "known": False, "passing": True, "choice": 2, "sample": 7},
        {"position": 9, "key": "b", "reason": "broken", "known": False, "passing": False, "choice": 0},
        {"position": 11, "key": "c", "reason": "named", "known": True, "passing": False, "choice": 0},
    ]
    (tmp_path / FILE).write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"position": 12, "ke')
    assert passing(tmp_path) == {3: Decided("gone", 2, 7)} and count_bad(tmp_path) == 2


def test_a_decision_is_of_its_sample() -> None:
    """At the same position of a run with another seed stands another, which is as good as any."""
    decided = Decided("gone", 2, sample=7)
    known = Quarantine(positions={3: decided})
    assert known.decided(3, 7) == decided and known.decided(3, 8) is None and known.decided(4, 7) is None
