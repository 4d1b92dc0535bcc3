"""A download's plan for people and for machines."""

from __future__ import annotations

from typing import Any

from oxe_mix.plan import SplitPlan
from oxe_mix.text import size, table


def plan_table(plans: list[SplitPlan]) -> str:
    """What is asked of each split, and in total."""
    rows = [
        (
            plan.spec.name,
            plan.spec.split,
            f"{plan.episodes:,} of {plan.split.num_episodes:,}",
            f"{len(plan.picks):,} of {len(plan.split.shard_lengths):,}",
            size(plan.estimated_bytes),
            f"{plan.estimated_frames:,}",
        )
        for plan in plans
    ]
    total = _total(plans)
    rows.append(
        (
            "total",
            "",
            f"{total['episodes']:,}",
            f"{total['shards']:,}",
            size(total["bytes"]),
            f"{total['frames']:,}",
        )
    )
    header = ("dataset", "split", "episodes", "shards", "about", "steps (est.)")
    return table(header, rows)


def plan_json(plans: list[SplitPlan]) -> dict[str, Any]:
    """The same as one JSON object."""
    rows = [
        {
            "dataset": plan.spec.name,
            "split": plan.spec.split,
            "fraction": plan.spec.fraction,
            "episodes": plan.episodes,
            "of_episodes": plan.split.num_episodes,
            "shards": len(plan.picks),
            "of_shards": len(plan.split.shard_lengths),
            "bytes": plan.estimated_bytes,
            "frames": plan.estimated_frames,
        }
        for plan in plans
    ]
    return {"event": "plan", "splits": rows, "total": _total(plans)}


def missing_words(plans: list[SplitPlan]) -> list[str]:
    """A line for every split whose source lacks shards that its dataset_info.json lists."""
    return [
        f"{plan.source.folder}: {len(plan.missing)} of {len(plan.picks)} shards asked for are not there, "
        f"though dataset_info.json lists them ({plan.missing[0]}, …); the source is not complete"
        for plan in plans
        if plan.missing
    ]


def _total(plans: list[SplitPlan]) -> dict[str, int]:
    return {
        "episodes": sum(plan.episodes for plan in plans),
        "shards": sum(len(plan.picks) for plan in plans),
        "bytes": sum(plan.estimated_bytes for plan in plans),
        "frames": sum(plan.estimated_frames for plan in plans),
    }
