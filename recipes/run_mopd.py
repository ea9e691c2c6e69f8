"""Train inside a NeMo-RL container or checkout, in the manner of its own examples.

    python recipes/run_mopd.py --config configs/nemo/FILE.yaml [KEY=VALUE]...
    python recipes/run_mopd.py --resume RUN_DIR

The same as `mopd train`, without this package being installed: docs/nemo.md.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mopd_nemo.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    main()
