"""Judge a recipe's synthetic samples and write the report.

ray job submit --working-dir . -- python -m jobs.evaluate jobs/recipes/phantom_demo.yaml
"""

import sys

from raysynth.__main__ import run

if __name__ == "__main__":
    run(["evaluate", *sys.argv[1:]])
