"""`degflow benchmark` as a file that other commands start."""

from degflow.__main__ import benchmark, start

if __name__ == "__main__":
    start(benchmark)
