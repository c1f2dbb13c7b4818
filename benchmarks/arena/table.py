"""A bench's standing as the tables of README.md, in Markdown.

python benchmarks/arena/table.py benchmarks/arena/standard
"""

import argparse
from pathlib import Path

from plywise.arena.reports.bench_page import judge, read_bench
from plywise.arena.scoring.conclusions import span
from plywise.arena.scoring.ranking import rank_methods

HEAD = (
    "| method | rank by CPU time | steps to target over the best baseline's | CPU time alike | reached the "
    "target | area under the profile, CPU / steps |\n|---|---|---|---|---|---|"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--track", default="tuned", choices=("tuned", "defaults"))
    options = parser.parse_args()
    judged = judge(*read_bench(options.folder))
    steps = {one.method: one for one in rank_methods(judged.field, options.track, "steps")}
    print(HEAD)
    for one in rank_methods(judged.field, options.track, "cpu"):
        ratios = [span(other.ratio) if other.ratio else "–" for other in (steps[one.method], one)]
        rank = "–" if one.rank is None else f"{one.rank.value:.0f}"
        areas = f"{one.area.value:.2f} / {steps[one.method].area.value:.2f}"
        print(f"| {one.method} | {rank} | {' | '.join(ratios)} | {one.reached} of {one.runs} | {areas} |")
    print()
    for sentence in judged.findings:
        print(f"- {sentence}")
    print("\nBest test metric of each workload, medians:\n")
    for workload in judged.field.workloads:
        own = [r for r in judged.rows if (r.track, r.workload) == (options.track, workload) and r.test]
        best = sorted(own, key=lambda row: row.test.median)[:6]
        print(f"- {workload}: {', '.join(f'{row.method} {row.test.median:.4g}' for row in best)}")


if __name__ == "__main__":
    main()
