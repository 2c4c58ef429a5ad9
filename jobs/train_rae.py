"""`degflow train-rae` as a file that other commands start."""

from degflow.__main__ import start, train_rae

if __name__ == "__main__":
    start(train_rae)
