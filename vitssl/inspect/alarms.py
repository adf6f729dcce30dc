"""Alarms: rows of what was measured of a run's health, read as a physician would. Arithmetic over numbers; no tensors.

Each rule looks at the rows since the run began and gives the likely cause in words, or nothing. A sign must stand in two rows
that follow each other, so an alarm comes at most two measurements after the first of them.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence

Row = Mapping[str, float]
Rule = Callable[[Sequence[Row], int], str | None]

LASTING = 2  # rows that a sign must stand in
ONE = 1.5  # prototypes: fewer, and all images are one
FEW_USED = 0.05  # of the prototypes that were used at the beginning, or of the images that meet, if they are fewer
EVEN = 0.995  # of the entropy of even targets: above it targets say nothing
FLAT = 0.15  # of the widest that the spread of features was
FEW = 0.3  # of the most that RankMe was, where
ALIKE = 0.5  # of the most that LiDAR was are left too: a mean that grows takes RankMe down, and tells images apart all the same
LEAST = 8  # images that meet: fewer use few prototypes however well they are
HIGH = 1.5  # times an objective's first loss
GROWN = 4.0  # times the first norm of the weights
FAR = 1e-7  # relative distance of a teacher's weights that is none


def alarm(rows: Sequence[Row], *, met: int, told: Collection[str] = ()) -> tuple[str, str] | None:
    """(its name, what is seen and the likely cause): the first alarm that the newest rows raise, of those not ``told`` yet.

    ``rows`` in the order of their steps; ``met``: how many images meet in a loss of one process, which choose prototypes.
    """
    rules = {name: rule for name, rule in RULES.items() if name not in told}
    return next(((name, said) for name, rule in rules.items() if (said := rule(rows, met))), None)


def _lasting(rows: Sequence[Row], sign: Callable[[Row], bool]) -> bool:
    return len(rows) > LASTING and all(sign(row) for row in rows[-LASTING:])


def _keys(rows: Sequence[Row], ending: str) -> list[str]:
    """The names of that ending, of whichever objective, in the newest row."""
    return [key for key in rows[-1] if key.rpartition("/")[2] == ending]


def _aliased(rows: Sequence[Row], met: int) -> str | None:
    """A teacher that is the student learns nothing from being asked."""
    if _lasting(rows, lambda row: row.get("teacher_distance", 1.0) < FAR):
        return "the teacher's weights are the student's: the teacher is an alias, or teacher.momentum is 0"
    return None


def _rising(rows: Sequence[Row], met: int) -> str | None:
    """Weights that have exploded, or an objective's loss, before its weight, above where it began."""
    first = rows[0]
    if _lasting(rows, lambda row: row["weights"] > GROWN * first["weights"]):
        grown = rows[-1]["weights"] / first["weights"]
        return f"the encoder's weights have grown to {grown:.1f} times their norm: the learning rate is too high"
    if "teacher_agreement" in rows[-1]:
        return None  # targets change with a teacher, so the loss may well rise
    for key in _keys(rows, "loss"):
        begun = next(row[key] for row in rows if key in row)  # there is none before the first step
        above = begun + (HIGH - 1) * abs(begun)
        if "/" in key and _lasting(rows, lambda row, key=key, begun=begun, above=above: row.get(key, begun) > above):
            return f"{key} is {rows[-1][key]:.4g} and was {begun:.4g} at first: the learning rate is too high"
    return None


def _one_prototype(rows: Sequence[Row], met: int) -> str | None:
    for key in _keys(rows, "usage") if met >= LEAST else ():
        begun = min(met, next(row[key] for row in rows if key in row))  # images that have made up their minds use one each
        if _lasting(rows, lambda row, key=key, begun=begun: row.get(key, begun) < max(ONE, FEW_USED * begun)):
            return (
                f"{key} is {rows[-1][key]:.3g}: all images go to a few prototypes; targets are not centred, or the centre's"
                " momentum is too high"
            )
    return None


def _even_targets(rows: Sequence[Row], met: int) -> str | None:
    for key in _keys(rows, "entropy"):
        if _lasting(rows, lambda row, key=key: row.get(key, 0.0) > EVEN):
            return (
                f"{key} is {rows[-1][key]:.4f}: targets are the same for all prototypes; the teacher's temperature is too high"
            )
    return None


def _collapsed(rows: Sequence[Row], met: int) -> str | None:
    known = [row for row in rows if math.isfinite(row["std"])]
    most = {key: max((row[key] for row in known), default=0.0) for key in ("std", "rankme", "lidar")}  # first rows may be small
    flat = _lasting(rows, lambda row: row["std"] < FLAT * most["std"])
    few = _lasting(rows, lambda row: row["rankme"] < FEW * most["rankme"] and row["lidar"] < ALIKE * most["lidar"])
    if not (flat or few):
        return None
    last = rows[-1]
    seen = f"spread {last['std']:.3f} (was {most['std']:.3f}), RankMe {last['rankme']:.1f} ({most['rankme']:.1f})"
    seen += f", LiDAR {last['lidar']:.1f} ({most['lidar']:.1f})"
    return f"features have collapsed, {seen}: the learning rate is too high, or nothing in the loss keeps images apart"


RULES: dict[str, Rule] = {
    "alias": _aliased,
    "divergence": _rising,
    "one prototype": _one_prototype,
    "even targets": _even_targets,
    "collapse": _collapsed,
}
"""In the order in which a cause is looked for: the plainest first, since all of them end in a collapse."""
