"""Measure the benefit of coordinates in `plywise.recommend`, by the layers that use them.

    python benchmarks/recommended_parts.py    # writes recommended_parts.json in five minutes; resumes

The data sets and the table are those of recommended_defaults.py, which none of our benches uses. All arms use
Muon for hidden weights and AdamW for the others. They use coordinates in the layers where `recommend` finds
them worth their time, in all layers, only in AdamW's layers (the output layer; the transformer has no such
layer that supports coordinates), or in no layer.
"""

import math

from plywise.arena.method import Method, Trainer, TrialContext, end_to_end
from recommended_defaults import make_recommended, recommend, run_untuned
from tuning import HERE


def train_without(context: TrialContext) -> Trainer:
    """Use Muon and AdamW without coordinates."""
    chosen = recommend(context, {})
    chosen.rule.detach()
    return end_to_end(context, chosen.optimizer)


def train_others(context: TrialContext) -> Trainer:
    """Use coordinates for the weights that AdamW updates."""
    chosen = recommend(context, {"budget": math.inf})
    rows = [row for row in chosen.rule.explain().rows if row.handled]
    others = [row.name for row in rows if not set(row.keys) & set(chosen.muon)]
    chosen.rule.detach()
    chosen.rule.attach(context.model, chosen.optimizer, layers=others, on_nonfinite="propagate")
    return end_to_end(context, chosen.optimizer)


ARMS = {"on AdamW's weights alone": train_others, "without coordinates": train_without}


if __name__ == "__main__":
    others = [Method(name, "", {}, begin) for name, begin in ARMS.items()]
    arms = [make_recommended("recommended", {}), make_recommended("on all layers", {"budget": math.inf})]
    run_untuned([*arms, *others], HERE / "recommended_parts.json")
