"""`degflow train-sr` as a file that other commands start."""

from degflow.__main__ import start, train_sr

if __name__ == "__main__":
    start(train_sr)
