"""A run's own quarantine file, as a continued run reads it."""

import json
from pathlib import Path

from vitssl.data.quarantine import FILE, Decided, count_bad, passing


def test_a_half_written_row_ends_what_is_read(tmp_path: Path) -> None:
    assert passing(tmp_path) == {} and count_bad(tmp_path) == 0
    rows = [
        {"position": 3, "key": "a", "reason": "gone", "known": False, "passing": True, "choice": 2, "sample": 7},
        {"position": 9, "key": "b", "reason": "broken", "known": False, "passing": False, "choice": 0},
        {"position": 11, "key": "c", "reason": "named", "known": True, "passing": False, "choice": 0},
    ]
    (tmp_path / FILE).write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"position": 12, "ke')
    assert passing(tmp_path) == {3: Decided("gone", 2, 7)} and count_bad(tmp_path) == 2
