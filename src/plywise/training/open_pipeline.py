"""Opens a training in the processes that torchrun started."""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.distributed as dist

from plywise._util.extras import TENSORBOARD, import_extra
from plywise._util.file_errors import explaining_files
from plywise.data.own_data import explaining
from plywise.errors import PipelineError
from plywise.local.learner import StagedLearner
from plywise.pipeline.cuts import from_first, measure_cuts
from plywise.pipeline.groups import join
from plywise.pipeline.pipeline import NO_STAGES, Pipeline
from plywise.training.build import ResolvedTraining, resolve_training
from plywise.training.config import TrainConfig
from plywise.training.run_folder import RunFolder
from plywise.training.session import Session, format_error


@contextmanager
def open_pipeline(plan: TrainConfig, *, fresh: bool = False) -> Iterator[Session]:
    """Open this process's part of a training, from the last checkpoint in the plan's folder, if any.

    All processes call this alike and see the same folder. An error in one of them ends all.

    Args:
        plan: the plan.
        fresh: start again, and delete what the folder holds of another run.

    Raises:
        PlywiseError: see `plywise.training.session.open_session`; or the processes do not fit the plan, or
            one of them is lost.
    """
    if plan.tensorboard:
        import_extra("torch.utils.tensorboard", TENSORBOARD)
    torch.set_num_threads(plan.threads)
    if plan.step is not None:
        raise PipelineError(
            "A step function trains a model as a whole, in one process: `plywise train` takes it.",
            see="pipeline-start",
        )
    training, folder = resolve_training(plan, plan.out), RunFolder(plan.out)
    data = training.data
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        # a rule with memory minds processes that share nothing; stages hold different components
        warnings.filterwarnings("ignore", r"\d+ processes run, but no Distrib", RuntimeWarning)
        join()
        stack.callback(dist.destroy_process_group)
        with explaining(data.note.splitlines()):
            learner, starts = _learner(training, folder, fresh)
        batch = next(iter(data.train.chunks(plan.batch_size)))
        cuts = plan.cuts or measure_cuts(learner, *batch, replicas=plan.replicas)
        pipeline = stack.enter_context(Pipeline(learner, cuts=cuts, replicas=plan.replicas))
        try:
            with explaining_files():
                if dist.get_rank() == 0:
                    folder.begin(plan, data, starts, fresh=fresh)
                pipeline.agree(True)  # the folder is ready
                log = f"log.stage{pipeline.stage}.jsonl" if pipeline.replica == 0 else None
                session = Session(plan, data, pipeline, folder, folder.last_step(), log)
                pipeline.agree(True)  # nobody writes before all have read
                del training, data, batch  # the session keeps what it needs: of most stages, nothing
                yield session
        except BaseException as error:
            pipeline.watch.report_failure(format_error(error))
            raise


def _learner(
    training: ResolvedTraining, folder: RunFolder, fresh: bool
) -> tuple[StagedLearner, tuple[int, ...]]:
    """Make the learner, cut as the first process has measured, or as the run was cut before."""
    if dist.get_rank() == 0:
        record = None if fresh else folder.check(training.config, training.data)
        blocks, starts = training.make_blocks(record.starts if record else ())
        from_first(starts)
    else:
        blocks, starts = training.make_blocks(from_first(()))
    learner = training.make_learner(blocks)
    if not isinstance(learner, StagedLearner):
        raise PipelineError(
            f"{NO_STAGES.format(type(learner).__name__)} `plywise train` takes it.", see="pipeline-start"
        )
    return learner, starts
