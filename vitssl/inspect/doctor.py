"""What ``vitssl check`` found, in words and as one HTML page that needs nothing else."""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from PIL import Image

from vitssl.data.doctor import Findings
from vitssl.inspect import html
from vitssl.inspect.pictures import sheet

COLUMNS = 12  # of the contact sheet


def in_words(found: Findings) -> list[tuple[str, str]]:
    """(what, value) for a person."""
    rows = [("images", f"{found.samples:,}, of which {len(found.damaged):,} are damaged")]
    rows += [("format", _counts(found.formats)), ("mode", _counts(found.modes))]
    if found.sizes:
        sizes = np.array(found.sizes)
        for name, column, unit in (("width", 0, " px"), ("height", 1, " px"), ("file", 2, " bytes")):
            low, middle, high = np.percentile(sizes[:, column], [5, 50, 95]).round().astype(int)
            least, most = sizes[:, column].min(), sizes[:, column].max()
            rows.append((name, f"{middle:,}{unit} (5 % below {low:,}, 5 % above {high:,}; {least:,} to {most:,})"))
        mean, std = (", ".join(f"{value:.3f}" for value in values) for values in (found.mean, found.std))
        rows += [("statistics", f"data.mean=[{mean}] data.std=[{std}]")]
    if found.labels:
        least, most = min(found.labels.values()), max(found.labels.values())
        rows.append(("labels", f"{len(found.labels):,} classes of {least:,} to {most:,} images"))
        unlabelled = found.samples - sum(found.labels.values())
        rows += [("unlabelled", f"{unlabelled:,} images")] if unlabelled else []
    extra = sum(len(group) - 1 for group in found.duplicates)
    rows.append(("twice", f"{extra:,} images are exact copies of others" + _examples(" = ".join(g) for g in found.duplicates)))
    if found.damaged:
        rows.append(
            ("damaged", "; ".join(reason for _, reason in found.damaged[:3]) + ("; ..." if len(found.damaged) > 3 else ""))
        )
    return rows


def page(title: str, found: Findings, classes: Sequence[str] | None) -> str:
    """One HTML page: the words, the classes as bars, a contact sheet, and every damaged or double image."""
    parts = [html.pairs(in_words(found))]
    if found.thumbs:
        parts += ["<h2>Images, spread evenly</h2>", f'<img alt="contact sheet" src="data:image/png;base64,{_sheet(found)}">']
    if found.labels:
        most = max(found.labels.values())
        bars = [
            (
                classes[label] if classes else str(label),
                f'<span class=bar style="width:{30 * count / most:.2f}em"></span> {count:,}',
            )
            for label, count in sorted(found.labels.items())
        ]
        parts += ["<h2>Classes</h2>", html.pairs(bars, plain=False)]
    for name, rows in (
        ("Damaged", [(key, reason) for key, reason in found.damaged]),
        ("The same bytes twice", [(str(number + 1), ", ".join(keys)) for number, keys in enumerate(found.duplicates)]),
    ):
        parts += [f"<h2>{name}</h2>", html.pairs(rows[:1000])] if rows else []
    return html.page(title, parts)


def _sheet(found: Findings) -> str:
    thumbs = [torch.from_numpy(thumb).permute(2, 0, 1) / 255 for _, thumb in sorted(found.thumbs, key=lambda each: each[0])]
    columns = min(COLUMNS, len(thumbs))
    thumbs += [torch.ones_like(thumbs[0])] * (-len(thumbs) % columns)
    buffer = io.BytesIO()
    Image.fromarray(sheet(torch.stack(thumbs).unflatten(0, (-1, columns))).numpy()).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items(), key=lambda each: -each[1])) or "none"


def _examples(groups: Iterable[str]) -> str:
    some = list(groups)[:2]
    return f" ({'; '.join(some)}{'; ...' if len(some) == 2 else ''})" if some else ""
