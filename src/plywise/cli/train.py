"""`plywise train`: trains a network block by block, by a file or flags, and resumes after interruptions."""

from plywise.cli.console import console, notes
from plywise.cli.training import Flags, Switch, again, conclude, following, introduce, plan_from


def train(plan: str | None = None, /, *, flags: Flags | None = None, fresh: Switch = False) -> None:
    """Train a network block by block: each block has its own loss, and no gradient crosses all blocks.

    The same command resumes from the last checkpoint, and ends with the same weights as without a stop.
    Ctrl-C lets the step finish and writes a checkpoint. `plywise pipeline` takes the same flags and goes on
    with the same runs. The log has a line of JSON for each step: step, epoch, losses by component, seconds
    and, after an epoch's last step, the accuracy on the test data.

    For example:

        # digits, in seconds
        plywise train
        plywise train mine:make_model --data mine.npz --blocks 6
        plywise train --rule ProxProp --rule-set tau=3 --optimizer SGD --rate 5
        # all blocks as one: backpropagation
        plywise train --learner Interlocking --set horizon=4 --out runs/backprop
        # flags win over the file
        plywise train plan.toml --epochs 20

    The keys of the file are the flags' names:

        learner = "AssociatedLearning"
        set = {code = 64}
        batch-size = 128

    Args:
        plan: a TOML file, or your model as module:name, as for --model.
        flags: what is trained.
        fresh: start again, and throw away what the folder holds of a run.
    """
    config = plan_from(plan, flags)
    step = None
    try:
        from plywise.training.session import open_session

        session = open_session(config, fresh=fresh)
        step, screen = session.began, notes()
        introduce(session, screen)
        with following(session, screen) as show:
            finished = session.run(show)
        step = session.step
    except KeyboardInterrupt:
        if step is None:
            raise KeyboardInterrupt("Nothing was changed.") from None
        raise KeyboardInterrupt(f"`{again()}` goes on from the last checkpoint in {config.out}.") from None
    if not finished:
        raise KeyboardInterrupt(
            f"The checkpoint of step {step} is in {config.out}: `{again()}` goes on from there."
        )
    conclude(session, console())
