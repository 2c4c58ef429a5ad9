"""`degflow train-lfm` as a file that other commands start."""

from degflow.__main__ import start, train_lfm

if __name__ == "__main__":
    start(train_lfm)
