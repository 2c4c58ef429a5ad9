"""Speed: the released procedure beside ours with the same weights, training steps, the Ray job, codecs.

    python jobs/benchmark.py output=runs/benchmark

prints Markdown tables and writes them to output/benchmark.md. It takes some minutes on two idle cores; quick=true only
shows that everything runs. Measure on a machine that does nothing else.
"""

from degflow.benchmarking.run import BenchmarkConfig, benchmark
from degflow.config import run

if __name__ == "__main__":
    run(benchmark, BenchmarkConfig, __doc__)
