"""Rows that fail stay rows: a verdict is written into the row, which then passes every later stage untouched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from pipeline.errors import ClipRejected, TooManyRejectsError

Row = dict[str, Any]
Stage = Callable[[Row], Row | list[Row]]


def run_stages(row: Row, stages: Sequence[tuple[str, Stage]]) -> list[Row]:
    """Send a row through named stages.

    Args:
        row: what to work on. Every result has three columns more, which are None where all went well: reject_reason,
            reject_detail, reject_stage.
        stages: name and function; a function gives one row, or a list of at least one.

    Returns:
        at least one row: no input is lost.
    """
    rows = [{**row, "reject_reason": None, "reject_detail": None, "reject_stage": None}]
    for name, stage in stages:
        rows = [after for before in rows for after in _run_guarded(before, name, stage)]
    return rows


def _run_guarded(row: Row, name: str, stage: Stage) -> list[Row]:
    if row["reject_reason"] is not None:
        return [row]
    try:
        result = stage(row)
    except ClipRejected as verdict:
        return [reject(row, name, verdict)]
    rows = result if isinstance(result, list) else [result]
    assert rows, f"stage {name} lost a row: {row}"
    return rows


def reject(row: Row, stage: str, verdict: ClipRejected) -> Row:
    """The row with a verdict written into it."""
    return {**row, "reject_reason": str(verdict.reason), "reject_detail": verdict.detail, "reject_stage": stage}


def reject_row(row: Row) -> Row:
    """The row of REJECTS for a rejected row: its clip id, or its source where there is no clip yet."""
    return {
        "what": row.get("clip_id") or row["source_uri"],
        "reason": row["reject_reason"],
        "detail": row["reject_detail"],
        "stage": row["reject_stage"],
    }


def check_rejects(num_lost: int, num_rows: int, reasons: Counter[str], max_fraction: float, folder: str) -> None:
    """Refuse to go on with too little of the input.

    Args:
        num_lost: input rows that gave nothing.
        num_rows: input rows.
        reasons: how often each RejectReason was given.
        max_fraction: largest share of lost rows that is accepted.
        folder: where the REJECTS shards are.

    Raises:
        TooManyRejectsError: more rows are lost than that, or all of them.
    """
    if num_lost < num_rows and num_lost <= max_fraction * num_rows:
        return
    top = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common(5)) or "the input is empty"
    raise TooManyRejectsError(
        f"{num_lost} of {num_rows} rows gave nothing ({top}); max_reject_fraction={max_fraction}. "
        f"What and why, row by row: {folder}/rejects/*.parquet"
    )
