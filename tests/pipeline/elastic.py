"""What torchrun does for two processes, but forks them from one that has imported torch.

``python elastic.py FOLDER SETTINGS`` starts `pipeline.stage.main` in both, and again if one of them is lost.
"""

import json
import sys
from pathlib import Path

from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from pipeline import stage

if __name__ == "__main__":
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        rdzv_backend="c10d",  # with the endpoint and the run's name, torchrun's --standalone
        rdzv_endpoint="localhost:0",
        run_id="restarts",
        max_restarts=2,
        monitor_interval=0.1,
        start_method="forkserver",
    )
    elastic_launch(config, stage.main)(Path(sys.argv[1]), json.loads(sys.argv[2]))
