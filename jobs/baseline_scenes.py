"""`degflow baseline-scenes` as a file that other commands start."""

from degflow.__main__ import baseline_scenes, start

if __name__ == "__main__":
    start(baseline_scenes)
