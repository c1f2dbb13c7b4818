"""What the coordinates bring in `plywise.recommend`, and on which layers.

    python benchmarks/recommended_parts.py    # writes recommended_parts.json in five minutes; resumes

The six sets of recommended_defaults.py, which no bench of ours judges, with the same table. Muon moves hidden
weights in all arms, and AdamW the others: in coordinates where `recommend` finds them worth their time, in
all layers, in AdamW's layers alone (the output layer; the transformer has none that could be turned), and in
none.
"""

import math

from plywise.arena.method import Method, Trainer, TrialContext, end_to_end
from recommended_defaults import make_recommended, recommend, run_untuned
from tuning import HERE


def train_without(context: TrialContext) -> Trainer:
    """Muon and AdamW alone."""
    chosen = recommend(context, {})
    chosen.rule.detach()
    return end_to_end(context, chosen.optimizer)


def train_others(context: TrialContext) -> Trainer:
    """Coordinates for the weights that AdamW moves."""
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
