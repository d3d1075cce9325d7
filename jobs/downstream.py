"""Train networks with and without a recipe's synthetic samples: do these help?

ray job submit --working-dir . -- python -m jobs.downstream jobs/recipes/phantom_demo.yaml
"""

import sys

from raysynth.__main__ import run

if __name__ == "__main__":
    run(["downstream", *sys.argv[1:]])
