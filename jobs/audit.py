"""Look for copies of training samples in a synthetic run; exits 3 if it must not leave.

ray job submit --working-dir . -- python -m jobs.audit jobs/recipes/lidc_attributes_ldm_4.yaml
"""

import sys

from raysynth.__main__ import run

if __name__ == "__main__":
    run(["audit", *sys.argv[1:]])
