"""`degflow train-residual` as a file that other commands start."""

from degflow.__main__ import start, train_residual

if __name__ == "__main__":
    start(train_residual)
