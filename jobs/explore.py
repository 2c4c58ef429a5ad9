"""A page on this machine that shows what a degrader does to one's own photograph.

    python jobs/explore.py photograph=photo.jpg

prints the page's address. The page has a slider over the scale, draws again, and shows HR, generated LR, bicubic and
plain blur side by side. Nothing leaves the machine.
"""

from degflow.config import run
from degflow.explore.run import ExploreConfig, explore

if __name__ == "__main__":
    run(explore, ExploreConfig, __doc__)
