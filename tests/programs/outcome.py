"""What several tests ask of a run that has ended, or of the folder it left."""

from pathlib import Path


def refused(run, *words: str, lines: int = 1) -> None:
    assert run.codes == [2], run.out + run.err
    assert run.err.startswith("error: ") and run.err.count("\n") <= lines and "Traceback" not in run.err + run.out
    for word in words:
        assert word in run.err


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
