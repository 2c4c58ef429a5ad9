"""`degflow evaluate` as a file that other commands start."""

from degflow.__main__ import evaluate, start

if __name__ == "__main__":
    start(evaluate)
